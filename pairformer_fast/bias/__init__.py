"""Pair representation to factors: certificate, decomposition, policy, and the attention module that uses them."""

from pairformer_fast.bias.attention import BiasReport, PairBiasAttention, collect_reports, set_attention
from pairformer_fast.bias.certificate import Certificate, certify
from pairformer_fast.bias.factors import BiasFactors
from pairformer_fast.bias.policy import Factorization, MissingFactorNetworksError, factorize

__all__ = [
    "BiasFactors",
    "BiasReport",
    "Certificate",
    "Factorization",
    "MissingFactorNetworksError",
    "PairBiasAttention",
    "certify",
    "collect_reports",
    "factorize",
    "set_attention",
]

"""Pair bias to factors: decompositions, closed forms, certificate, policy, and the attention that uses them."""

from pairformer_fast.bias.attention import (
    BiasReport,
    Configured,
    Decision,
    PairBiasAttention,
    collect_reports,
    observed_decisions,
    set_attention,
)
from pairformer_fast.bias.certificate import Certificate, certify
from pairformer_fast.bias.factors import BiasFactors
from pairformer_fast.bias.landmark import BiasLines, Landmarks, SampledFactors, factorize_lines
from pairformer_fast.bias.methods import MissingFactorNetworksError, factorize
from pairformer_fast.bias.policy import Factorization
from pairformer_fast.bias.structured import relative_position

__all__ = [
    "BiasFactors",
    "BiasLines",
    "BiasReport",
    "Certificate",
    "Configured",
    "Decision",
    "Factorization",
    "Landmarks",
    "MissingFactorNetworksError",
    "PairBiasAttention",
    "SampledFactors",
    "certify",
    "collect_reports",
    "factorize",
    "factorize_lines",
    "observed_decisions",
    "relative_position",
    "set_attention",
]

"""Pair bias to factors: decompositions, closed forms, certificate, policy, and the attention that uses them."""

from pairformer_fast.bias.attention import (
    BiasReport,
    Configured,
    Decision,
    PairBiasAttention,
    attach_factors,
    collect_reports,
    detach_factors,
    factor_ranks,
    observed_decisions,
    set_attention,
    warm_starts,
)
from pairformer_fast.bias.certificate import Certificate, certify
from pairformer_fast.bias.factors import BiasFactors
from pairformer_fast.bias.landmark import BiasLines, Landmarks, SampledFactors, factorize_lines
from pairformer_fast.bias.learned import FactorNetwork, FactorNetworks, FactorsError, NetworkShape
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
    "FactorNetwork",
    "FactorNetworks",
    "Factorization",
    "FactorsError",
    "Landmarks",
    "MissingFactorNetworksError",
    "NetworkShape",
    "PairBiasAttention",
    "SampledFactors",
    "attach_factors",
    "certify",
    "collect_reports",
    "detach_factors",
    "factor_ranks",
    "factorize",
    "factorize_lines",
    "observed_decisions",
    "relative_position",
    "set_attention",
    "warm_starts",
]

"""A Protenix whose Pairformer runs through this package, in an environment of its own.

Protenix pins every dependency, most of which its model does not need; the others are those of the extra [openfold] and
what is installed here. Its own layer norm is a CUDA extension, which it is told to do without.
"""

import pytest

PROTENIX = ("--no-deps", "protenix==2.0.0", "optree>=0.17")


@pytest.mark.slow
def test_accelerated_protenix_predicts_what_protenix_does(run_checks) -> None:
    pytest.importorskip("pytorch_lightning", reason="needs the dependencies of the extra [openfold]")
    run_checks("protenix", [PROTENIX], {}, LAYERNORM_TYPE="torch")

"""A Boltz whose Pairformer runs through this package, in an environment of its own.

Boltz pins every dependency, most of which its model does not need; the others are those of the extra [openfold] and
what is installed here. Of fairscale it takes one function, which no test has to do anything.
"""

import pytest

BOLTZ = ("--no-deps", "boltz==2.2.1", "einops>=0.8", "einx>=0.3,<0.5", "frozendict>=2.4", "mashumaro>=3.14")
CHECKPOINTS = """
def checkpoint_wrapper(module, offload_to_cpu=False):
    return module
"""


@pytest.mark.slow
def test_accelerated_boltz_predicts_what_boltz_does(run_checks) -> None:
    pytest.importorskip("pytorch_lightning", reason="needs the dependencies of the extra [openfold]")
    run_checks("boltz", [BOLTZ], {"fairscale/nn/checkpoint/checkpoint_activations.py": CHECKPOINTS})

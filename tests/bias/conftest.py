import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

VARIABLE_DOMAIN = (
    "DIVLSQSPAILSASPGEKVTMTCRASSSVSYIHWFQQKPGSSPKPWIYATSNLASGVPVRFSGSGSGTSYSLTISRVEAEDAATYYCQQWTSNPPTFGGGTKLEIK"
)


@pytest.fixture(scope="session")
def biases_of_two_recycles() -> list[torch.Tensor]:
    """Biases ``[1, 4, N, N]`` of the bundled model's triangle attentions for a domain, in the order of their making."""
    from pairformer_fast.bias import PairBiasAttention
    from pairformer_fast.features import TokenFeatures
    from pairformer_fast.model.checkpoint import default_checkpoint, load_checkpoint

    model, found = load_checkpoint(default_checkpoint()).eval(), []
    decide = PairBiasAttention.decide

    def keep(core, q, k, bias, mask):
        if q.ndim == 5:
            found.append(bias)
        return decide(core, q, k, bias, mask)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(PairBiasAttention, "decide", keep)
        model(TokenFeatures.from_chains([VARIABLE_DOMAIN]), 1)
    return found


@pytest.fixture(scope="session")
def trained_biases(biases_of_two_recycles) -> list[torch.Tensor]:
    """Those before the recycle."""
    return biases_of_two_recycles[: len(biases_of_two_recycles) // 2]


@pytest.fixture(scope="session")
def recycled_biases(biases_of_two_recycles) -> list[torch.Tensor]:
    """Those of the same attentions in the recycle."""
    return biases_of_two_recycles[len(biases_of_two_recycles) // 2 :]

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

VARIABLE_DOMAIN = (
    "DIVLSQSPAILSASPGEKVTMTCRASSSVSYIHWFQQKPGSSPKPWIYATSNLASGVPVRFSGSGSGTSYSLTISRVEAEDAATYYCQQWTSNPPTFGGGTKLEIK"
)


@pytest.fixture(scope="session")
def trained_biases() -> list[torch.Tensor]:
    """Biases ``[1, 4, N, N]`` of the bundled model's triangle attentions for a domain, in the order of their making."""
    from pairformer_fast.features import TokenFeatures
    from pairformer_fast.model.attention import TriangleAttention
    from pairformer_fast.model.checkpoint import default_checkpoint, load_checkpoint

    model, found = load_checkpoint(default_checkpoint()).eval(), []
    for module in model.modules():
        if isinstance(module, TriangleAttention):
            module.mha.register_forward_pre_hook(lambda _, inputs: found.append(inputs[1]))
    with torch.no_grad():
        model(TokenFeatures.from_chains([VARIABLE_DOMAIN]), 0)
    return found

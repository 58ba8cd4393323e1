import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_empty_memory():
    """Make torch.empty return NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

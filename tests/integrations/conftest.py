import pytest
import torch


@pytest.fixture(autouse=True)
def unchanged_matmul_precision():
    """Put back the precision of fp32 products, which OpenFold3's runner lowers for the whole process."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)

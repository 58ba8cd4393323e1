"""The kernels compile for an H100 where there is none, with the Triton that is installed."""

import pytest

from tests.kernels.compiling import compiled_for_sm_90


def test_tiles_of_the_table_fit_an_h100(tmp_path):
    pytest.importorskip("triton", reason="no Triton here: pip install 'pairformer_fast[dev]' on Linux")
    kernels = compiled_for_sm_90("compile_layer_norm_linear.py", tmp_path)
    assert len(kernels) == 5
    for kernel in kernels:
        assert not kernel["spills"], f"registers spilled: {kernel}"

"""The Hopper kernels compile for an H100 where there is none, with the Triton that is installed."""

import pytest

from tests.kernels.compiling import compiled_for_sm_90


def test_production_kernels_compile_for_sm_90(tmp_path):
    pytest.importorskip("triton", reason="no Triton here: pip install 'pairformer_fast[dev]' on Linux")
    kernels = compiled_for_sm_90("compile_hopper.py", tmp_path)
    assert {kernel["kernel"] for kernel in kernels} == {"forward", "backward_dq", "backward_dkv", "backward_pairs"}
    for kernel in kernels:
        assert kernel["copies"], f"no bulk copies: {kernel}"
        assert not kernel["unfinished"], f"shared memory is given back while it is read: {kernel}"
        assert kernel["arrivals"] > 3, f"the disassembly has changed and nothing was checked: {kernel}"
    # Otherwise the disassembly has changed and nothing was checked.
    assert sum(kernel["from_registers"] for kernel in kernels) > 50

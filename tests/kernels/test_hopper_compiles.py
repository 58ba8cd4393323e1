"""The Hopper kernels compile for an H100 where there is none, with the Triton that is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = 227 * 1024
"""What one block may take on sm_90."""


def test_production_kernels_compile_for_sm_90(tmp_path):
    pytest.importorskip("triton", reason="no Triton here: pip install 'pairformer_fast[dev]' on Linux")
    script = Path(__file__).with_name("compile_hopper.py")
    # The interpreter that the other tests use leaves no compiler; a cache of its own, so that it compiles.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {"forward", "backward_dq", "backward_dkv", "backward_pairs"}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_BYTES, kernel
        assert kernel["wgmma"], f"no tensor core products: {kernel}"
        assert kernel["copies"], f"no bulk copies: {kernel}"
        assert not kernel["overwritten"], f"miscompiled: {kernel}"
        assert not kernel["unfinished"], f"shared memory is given back while it is read: {kernel}"
        assert kernel["arrivals"] > 3, f"the disassembly has changed and nothing was checked: {kernel}"
    # Otherwise the disassembly has changed and nothing was checked.
    assert sum(kernel["from_registers"] for kernel in kernels) > 50

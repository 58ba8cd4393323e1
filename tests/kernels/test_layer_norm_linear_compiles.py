"""The kernels compile for an H100 where there is none, with the Triton that is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = 227 * 1024
"""What one block may take on sm_90."""


def test_tiles_of_the_table_fit_an_h100(tmp_path):
    pytest.importorskip("triton", reason="no Triton here: pip install 'pairformer_fast[dev]' on Linux")
    script = Path(__file__).with_name("compile_layer_norm_linear.py")
    # The interpreter that the other tests use leaves no compiler; a cache of its own, so that it compiles.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(kernels) == 5
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_BYTES, kernel
        assert kernel["wgmma"], f"no tensor core products: {kernel}"
        assert not kernel["spills"], f"registers spilled: {kernel}"
        assert not kernel["overwritten"], f"miscompiled: {kernel}"

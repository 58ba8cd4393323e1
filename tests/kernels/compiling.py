"""What the compiler makes of the kernels for an H100, on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SHARED_BYTES = 227 * 1024
"""What one block may take on sm_90."""


def compiled_for_sm_90(script: str, cache: Path) -> list[dict[str, Any]]:
    """Run a script of this folder that prints one JSON line a kernel, and check what every kernel has to satisfy."""
    # The interpreter that the other tests use leaves no compiler; a cache of its own, so that it compiles.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, Path(__file__).with_name(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_BYTES, kernel
        assert kernel["wgmma"], f"no tensor core products: {kernel}"
        assert not kernel["overwritten"], f"miscompiled: {kernel}"
    return kernels

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["triton"] = None
import pairformer_fast, pairformer_fast.bias
from pairformer_fast.kernels.flash_bias import flash_bias_attention
import torch
x = torch.zeros(1, 3, 2, 4)
assert flash_bias_attention(x, x, x).shape == x.shape
assert not any("triton" in name for name, module in sys.modules.items() if name.startswith("pairformer_fast"))
"""


def test_package_imports_and_runs_without_triton(tmp_path):
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr

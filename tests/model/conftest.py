"""The kernels run in Triton's interpreter here too."""

from tests.kernels.conftest import mended_interpreter

__all__ = ["mended_interpreter"]

"""The kernels run in Triton's interpreter here too."""

from tests.kernels.conftest import interpreter_with_new_numpy

__all__ = ["interpreter_with_new_numpy"]

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses deterministic algorithms


@pytest.fixture(autouse=True)
def poisoned_empty_memory():
    """Make torch.empty return NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def mended_interpreter():
    """Triton's interpreter where versions of it stumble and the compiler does not.

    That of 3.6 loops up to arrays of one element, which NumPy 2.4 no longer takes for integers. That of 3.9 makes
    integers of a mask that was combined with a comparison of integers, and refuses them.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def truth(mask):
        integers = isinstance(mask, interpreter.TensorHandle) and mask.data.dtype != bool
        return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype) if integers else mask

    def masked_load(self, pointers, mask, *rest, **more):
        return load(self, pointers, truth(mask), *rest, **more)

    def masked_store(self, pointers, value, mask, *rest, **more):
        return store(self, pointers, value, truth(mask), *rest, **more)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index

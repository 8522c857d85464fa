"""Warnings of PyTorch's own, while it compiles or exports, which tests leave aside."""

import pytest

COMPILING_WARNINGS = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor that is not a leaf"
)

"""Calls that ``torch.compile`` leaves out of its graphs. Imported while it traces: the import loads its compiler."""

from collections.abc import Callable
from typing import Any

import torch


def _call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return function(*args, **options)


call = torch.compiler.disable(
    _call,
    reason="With compile=True a solve to a tolerance is a graph of its own. For one graph take a fixed number of "
    "steps: rtol=None, atol=None, max_steps=n.",
)

answer = torch.compiler.disable(
    _call,
    reason="An answer that any code may have found is checked on the host, and differentiated by what it satisfies.",
)

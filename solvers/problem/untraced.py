"""What ``torch.compile`` leaves out of its graphs. Imported while it traces: the import loads PyTorch's compiler."""

from collections.abc import Callable
from typing import Any

import torch

_REASON = (
    "A solve to a tolerance decides on the host when to stop, and with compile=True is a graph of its own. For one "
    "graph take a fixed number of steps: rtol=None, atol=None, max_steps=n."
)


def _call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return function(*args, **options)


call = torch.compiler.disable(_call, reason=_REASON)

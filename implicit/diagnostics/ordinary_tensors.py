"""The parameters and buffers of a model that was built in inference mode, as tensors that autograd works with."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def ordinary_tensors(model: nn.Module) -> Iterator[None]:
    """Within the context, the inference tensors among a model's parameters and buffers are replaced by copies.

    Inference tensors can neither be saved for a backward pass nor be changed in place outside of inference mode.
    """
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:  # a tied parameter stays tied
            values = tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if is_parameter else values
        return copies[id(tensor)]

    held: list[tuple[dict[str, Any], str, Tensor]] = [
        (entries, name, tensor)
        for module in model.modules()
        for entries in (module._parameters, module._buffers)
        for name, tensor in entries.items()
        if tensor is not None and tensor.is_inference()
    ]
    try:
        with torch.inference_mode(False):
            for entries, name, tensor in held:
                entries[name] = copy(tensor)
        yield
    finally:
        for entries, name, tensor in held:
            entries[name] = tensor

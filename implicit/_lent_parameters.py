"""The parameters that a map's modules had in the forward pass, for calls in the backward pass.

``torch.func.functional_call`` lends a module other tensors for the time of one call. A backward pass that calls the map
again comes later, and must find the same ones.
"""

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

# A module's own parameters or buffers, a name in them, and the tensor of that name.
Entry = tuple[dict[str, Tensor | None], str, Tensor | None]


def tensors_of(modules: Sequence[nn.Module]) -> list[Entry]:
    """Every parameter and buffer of these modules and their children, as they are now."""
    return [
        (owner, name, tensor)
        for root in modules
        for module in root.modules()
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
    ]


@contextlib.contextmanager
def in_place(entries: Sequence[Entry]) -> Iterator[None]:
    """Inside, the modules have these tensors; nothing is done where they have them anyway."""
    others = [
        (owner, name, owner.get(name), tensor) for owner, name, tensor in entries if owner.get(name) is not tensor
    ]
    for owner, name, _, tensor in others:
        owner[name] = tensor
    try:
        yield
    finally:
        for owner, name, before, _ in others:
            owner[name] = before

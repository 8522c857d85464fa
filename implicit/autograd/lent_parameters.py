"""The parameters that a map's modules had in the forward pass, for calls in the backward pass.

``torch.func.functional_call`` lends a module other tensors for the time of one call. A backward pass that calls the map
again comes later, and must find the same ones.
"""

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn import Parameter

# A module's own parameters, a name among them, and the parameter of that name, or what was lent in its place.
Entry = tuple[dict[str, Parameter | None], str, Parameter | None]


def parameters_of(modules: Sequence[nn.Module]) -> list[Entry]:
    """Every parameter of these modules and their children, as it is now. Buffers are left alone: f may replace them."""
    return [
        (module._parameters, name, parameter)
        for root in modules
        for module in root.modules()
        for name, parameter in module._parameters.items()
    ]


@contextlib.contextmanager
def in_place(entries: Sequence[Entry]) -> Iterator[None]:
    """Inside, the modules have these parameters; nothing is done where they have them anyway."""
    others = [(owner, name, owner.get(name), then) for owner, name, then in entries if owner.get(name) is not then]
    for owner, name, _, then in others:
        owner[name] = then
    try:
        yield
    finally:
        for owner, name, now, _ in others:
            owner[name] = now

"""Calls of a function around every solve of the implicit layers in a model."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from implicit.implicit_layer import ImplicitLayer
from solvers import Solution

# Takes the layer's own solve, its name, the layer, the map, the start, the inputs and the options of the call.
Around = Callable[..., Solution[Any]]


def implicit_layers(model: nn.Module) -> dict[str, ImplicitLayer]:
    """Return the implicit layers of a model by their names; a ValueError if there are none."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"The model must be a torch.nn.Module, got {model!r}. For a map f, pass implicit.FixedPointLayer(f)."
        )
    found = {name: module for name, module in model.named_modules() if isinstance(module, ImplicitLayer)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no implicit layer: no FixedPointLayer, InvertibleResidual or iMLP. For a "
            "map f that is solved by implicit.fixed_point or solvers.solve, pass implicit.FixedPointLayer(f, ...)."
        )
    return found


def place_of(name: str, model: nn.Module) -> str:
    """Return what a layer is called in tables: its name, and the types of the layer and of the module around it."""
    layer = model.get_submodule(name)
    parent = model.get_submodule(name.rpartition(".")[0])
    kind = type(layer).__name__
    if parent is not layer and not type(parent).__module__.startswith("torch."):
        kind += f" of {type(parent).__name__}"
    return f"{name or 'the model'} ({kind})"


@contextlib.contextmanager
def around_solves(layers: dict[str, ImplicitLayer], around: Around) -> Iterator[None]:
    """Within the context, let ``around(solve, name, layer, f, z0, inputs, **options)`` make every solve of the layers.

    ``solve(f, z0, inputs, **options)`` is the layer's own.
    """

    def wrapped(name: str, layer: ImplicitLayer) -> Callable[..., Solution[Any]]:
        solve = layer._solve

        def call(f: Callable[..., Any], z0: Any, inputs: tuple[Any, ...], **options: Any) -> Solution[Any]:
            return around(solve, name, layer, f, z0, inputs, **options)

        return call

    before = {name: vars(layer).get("_solve") for name, layer in layers.items()}
    for name, layer in layers.items():
        vars(layer)["_solve"] = wrapped(name, layer)
    try:
        yield
    finally:
        for name, layer in layers.items():
            if before[name] is None:
                del vars(layer)["_solve"]
            else:
                vars(layer)["_solve"] = before[name]

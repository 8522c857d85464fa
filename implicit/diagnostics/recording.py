"""Recording the solution of every implicit layer in a model."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from implicit.implicit_layer import ImplicitLayer
from solvers import Solution

Observer = Callable[[Solution[Any]], None]


@contextlib.contextmanager
def record_solutions(model: nn.Module) -> Iterator[dict[str, list[Solution[Any]]]]:
    """Within the context, record the solution of every forward pass of every implicit layer in the model.

    Use it for a few forward passes, not around a whole training run: the record keeps all values and solver states
    alive. Each solution has its history; residuals are computed even if a layer takes a fixed number of steps.

    Args:
        model: Any module; the layers are found by type among its submodules.

    Yields:
        A dictionary from the name of each layer to the solutions of its calls, in order.

    Example:
        >>> import torch
        >>> from implicit import FixedPointLayer, record_solutions
        >>> layer = FixedPointLayer(lambda z, x: 0.5 * z + x, solver="picard", rtol=None, atol=None, max_steps=3)
        >>> with record_solutions(layer) as record:
        ...     _ = layer(torch.ones(1, 2))
        >>> record[""][0].history.flatten()  # |z_{k+1} - z_k| / |z_{k+1}|
        tensor([1.0000, 0.3333, 0.1429])
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ImplicitLayer)}
    record: dict[str, list[Solution[Any]]] = {name: [] for name in layers}
    before = {name: layer._observer for name, layer in layers.items()}
    for name, layer in layers.items():
        layer._observer = _both(record[name].append, before[name])
    try:
        yield record
    finally:
        for name, layer in layers.items():
            layer._observer = before[name]


def _both(first: Observer, second: Observer | None) -> Observer:
    """Both of them: records may be nested."""

    def observe(solution: Solution[Any]) -> None:
        first(solution)
        if second is not None:
            second(solution)

    return observe

"""Recording the solution of every solve that a model makes."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from implicit.diagnostics.solve_hook import SolveNames, observed_solves
from solvers import Solution


@contextlib.contextmanager
def record_solutions(model: nn.Module) -> Iterator[dict[str, list[Solution[Any]]]]:
    """Within the context, record the solution of every solve that a model makes.

    These are the solves of its implicit layers, and the calls of :func:`implicit.fixed_point` and
    :func:`implicit.root` in its methods, by names such as ``"head: root of kepler"``. Solves inside a graph of
    ``torch.compile`` and in other threads are not seen.

    Use it for a few forward passes, not around a whole training run: the record keeps all values and solver states
    alive. Each solution has its history; residuals are computed even if a layer takes a fixed number of steps.

    Args:
        model: A model with implicit layers or calls of ``fixed_point`` and ``root``.

    Yields:
        A dictionary from the name of each layer, also of one that makes no solve, and of each call to its solutions,
        in order.

    Raises:
        TypeError: The model is no module.

    Example:
        >>> import torch
        >>> from implicit import FixedPointLayer, record_solutions
        >>> layer = FixedPointLayer(lambda z, x: 0.5 * z + x, solver="picard", rtol=None, atol=None, max_steps=3)
        >>> with record_solutions(layer) as record:
        ...     _ = layer(torch.ones(1, 2))
        >>> record[""][0].history.flatten()  # |z_{k+1} - z_k| / |z_{k+1}|
        tensor([1.0000, 0.3333, 0.1429])
    """
    names = SolveNames(model)
    record: dict[str, list[Solution[Any]]] = {name: [] for name in names.layers}

    def keep(name: str, solution: Solution[Any]) -> None:
        record.setdefault(name, []).append(solution)

    with observed_solves(names, keep, history=True):
        yield record

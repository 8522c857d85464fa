"""The solver's intermediate iterates, with gradients, for losses on the way to the fixed point."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from implicit.autograd.constant_weights import constant_weights
from solvers import NOT_GIVEN, Iteration, Solver, StopRule, Tolerance
from solvers.problem.flat_map import FlatMap
from solvers.problem.layout import Layout


def iterates(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    steps: Sequence[int],
    solver: Solver | str = "anderson",
    stopping: StopRule | None = None,
    rtol: Tolerance = NOT_GIVEN,
    atol: Tolerance = NOT_GIVEN,
    batch_dims: int = 1,
) -> list[Any]:
    """Return intermediate iterates of the solver, each with the gradient of one application of the map.

    For each k in ``steps``, let v_k be the value after k steps (``solve(..., max_steps=k).value``). Then

        z_k = f(v_k, *args),   where v_k is a constant.

    Add a loss on some of these to the loss on the fixed point ("fixed-point correction"): it teaches the map to come
    close early, so that fewer steps suffice. The gradient is that of the Jacobian-free mode at v_k. It is biased, but
    for contractions it points downhill, and it needs no linear solve. The solve takes at most ``steps[-1]`` steps and
    stores nothing for the backward pass; each k costs one call of f with gradients and its memory. Samples that
    converge earlier are frozen at their solution. The gradient holds in reverse mode only; forward-mode derivatives
    pass through the steps as well.

    To continue to the fixed point, start the layer from the last iterate: ``layer(x, z0=zs[-1])``. This takes a few
    more steps than a single solve, since the solver starts with an empty memory.

    Args:
        f: The map, as in :func:`implicit.fixed_point`.
        z0: The start.
        *args: Further arguments of ``f``.
        steps: Numbers of steps, in increasing order.
        solver: A solver or its name.
        rtol: As in :func:`solvers.solve`.
        atol: As in :func:`solvers.solve`.
        stopping: As in :func:`solvers.solve`.
        batch_dims: As in :func:`solvers.solve`.

    Returns:
        One state like ``z0`` for each of ``steps``. Once all samples have converged, the entries repeat.

    Raises:
        TypeError, ValueError: The state, an option or the result of ``f`` is invalid.

    References:
        Bai, Geng, Savani and Kolter, "Deep equilibrium optical flow estimation", CVPR (2022).

    Example:
        >>> import torch
        >>> from implicit import FixedPointLayer
        >>> layer = FixedPointLayer(lambda z, x: 0.5 * torch.tanh(z) + x)
        >>> x = torch.ones(2, 3, requires_grad=True)
        >>> zs = layer.iterates(x, steps=(1, 3))
        >>> zs.append(layer(x, z0=zs[-1]))
        >>> loss = sum(0.8 ** (2 - i) * z.square().mean() for i, z in enumerate(zs))
    """
    steps = list(steps)
    if not steps or not all(isinstance(k, int) and k > before for before, k in zip([0, *steps], steps, strict=False)):
        raise ValueError(f"steps must be increasing positive integers, got {steps!r}. Give such as (1, 3, 10).")
    found: list[Any] = []
    layout = Layout(z0, batch_dims)
    one_step = FlatMap(f, args, layout)
    with constant_weights():
        with torch.no_grad():
            iteration = Iteration(
                f,
                z0,
                solver,
                args=args,
                rtol=rtol,
                atol=atol,
                stopping=stopping,
                max_steps=steps[-1],
                batch_dims=batch_dims,
            )
        for k in steps:
            if found and iteration.done:
                found.append(found[-1])
                continue
            with torch.no_grad():
                while iteration.num_steps < k and not iteration.done:
                    iteration.step()
                value = layout.pack(iteration.solution().value)
            found.append(layout.unpack(one_step(value)))
    return found

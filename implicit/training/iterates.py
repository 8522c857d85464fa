"""The solver's intermediate iterates, with gradients, for losses on the way to the fixed point."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from implicit.autograd.constant_weights import constant_weights
from solvers import Iteration, Solver, Stopping
from solvers._stopping import ATOL, RTOL
from solvers.problem.flat_map import FlatMap
from solvers.problem.layout import Layout


def iterates(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    steps: Sequence[int],
    solver: Solver | str = "anderson",
    rtol: Any = RTOL,
    atol: Any = ATOL,
    stopping: Stopping | None = None,
    batch_dims: int = 1,
) -> list[Any]:
    """States that the solver passes on its way, each with the gradient of one application of the map.

    For each k in ``steps``, with v_k what the solver has after k steps (``solve(..., max_steps=k).value``):

        z_k = f(v_k, *args),   where v_k is a constant.

    A loss on some of these, beside the one on the fixed point, teaches the map to come close early, so that fewer steps
    do: "fixed-point correction". The gradient is that of the Jacobian-free mode at v_k: biased, but it points
    downhill for contractions, and costs no linear solve. The solve takes ``steps[-1]`` steps at most and stores nothing
    for the backward pass; each k costs one call of f with gradients, and the memory of it. Samples that converge
    before are frozen at their solution. In reverse mode only: forward-mode derivatives see the steps too.

    To go on to the fixed point, start the layer from the last iterate, ``layer(x, z0=zs[-1])``. It costs a few steps
    more than a solve in one piece, since the solver forgets what it has learnt.

    Args:
        f: As in :func:`implicit.fixed_point`, and so on.
        z0: The start.
        *args: Further arguments of ``f``.
        steps: Numbers of steps, increasing.
        solver: A solver or its name.
        rtol: As in :func:`solvers.solve`.
        atol: As in :func:`solvers.solve`.
        stopping: As in :func:`solvers.solve`.
        batch_dims: As in :func:`solvers.solve`.

    Returns:
        One state for each of ``steps``, like ``z0``. From where all samples have converged, the same one.

    Raises:
        TypeError, ValueError: The state, an option or what ``f`` returns is unfit.

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
        raise ValueError(f"steps must be increasing positive integers, got {steps!r}.")
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

"""Differentiation through the solver's steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

from implicit.autograd.constant_weights import constant_weights
from implicit.autograd.torch_internals import transform_active
from implicit.backward.backward import Backward, SolveOptions, require_differentiable
from solvers import Solution, Solver

# What PyTorch says when something under vmap looks at values.
_LOOKS_UNDER_VMAP = ("data-dependent control flow", "doesn't have storage", ".item() on a Tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unrolled(Backward):
    """Backpropagate through every step of the solver, as through a network of that depth.

    The gradient is that of the value actually returned, whether or not it has converged: exact for a fixed number of
    steps, as the published iMixer trains, and for a solve to tolerance close to :class:`implicit.Implicit`'s.
    Memory and backward time grow with the number of steps: as many vector-Jacobian products as calls of the map, and
    no extra call. The start gets a gradient too.

    Every order of derivative and the ``torch.func`` transforms are PyTorch's own; but for ``vmap`` of a solve to a
    tolerance, which would have to stop by the values of many solves at once.
    """

    def check(self, solver: Solver) -> None:
        require_differentiable(self, solver)

    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        with constant_weights():
            try:
                return options.solve(f, z0, args)
            except RuntimeError as error:
                if not (transform_active() and any(message in str(error) for message in _LOOKS_UNDER_VMAP)):
                    raise
                raise RuntimeError(
                    f"{self!r} cannot test for convergence under torch.func.vmap, and so not under jacfwd or hessian. "
                    "Take a fixed number of steps, rtol=None, atol=None, max_steps=n, or the implicit backward mode."
                ) from error

"""Differentiation through the solver's steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

from implicit._explicit_map import vmap_active
from implicit._parametrized import modules_used_by, parametrized_slots, substituted
from implicit.backward._base import Backward, SolveOptions
from solvers import Solution, Solver


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
        if not solver.differentiable:
            raise ValueError(
                f"{self!r} needs gradients through the steps of the solver, and none flow through those of {solver!r}. "
                "Use the implicit backward mode, or Picard, Anderson or Broyden."
            )

    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        if options.stopping is not None and vmap_active():
            raise RuntimeError(
                f"{self!r} cannot test for convergence under torch.func.vmap. Take a fixed number of steps, "
                "rtol=None, atol=None; or use the implicit backward mode."
            )
        slots = parametrized_slots(modules_used_by(f))
        with substituted(slots, [getattr(module, name) for module, name in slots]):
            return options.solve(f, z0, args)

"""Differentiation through the solver's steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

from implicit._parametrized import modules_used_by, parametrized_slots, substituted
from implicit.backward._base import Backward, SolveOptions, require_differentiable
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
        require_differentiable(self, solver)

    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        slots = parametrized_slots(modules_used_by(f))
        with substituted(slots, [getattr(module, name) for module, name in slots]):
            try:
                return options.solve(f, z0, args)
            except RuntimeError as error:
                if options.stopping is None or "data-dependent control flow" not in str(error):
                    raise
                raise RuntimeError(
                    f"{self!r} cannot test for convergence under torch.func.vmap. Take a fixed number of steps, "
                    "rtol=None, atol=None; or use the implicit backward mode."
                ) from error

"""Differentiation through one call of the map."""

import dataclasses
from collections.abc import Callable
from typing import Any

from implicit.backward.backward import Backward, SolveOptions
from implicit.backward.phantom import Phantom
from solvers import Solution


@dataclasses.dataclass(frozen=True, kw_only=True)
class JFB(Backward):
    """Jacobian-free backpropagation: differentiate one call of the map at the solution, taken as a constant.

    With w the incoming gradient,

        gradient to each input or parameter t = (df/dt)' w,

    the first term of the series for :class:`implicit.Implicit`'s. The bias is (df/dt)' J' u, with u the exact solution
    of the adjoint problem: as large as the contraction factor of the map. For contractions of well-conditioned df/dt
    it is a direction of descent, says the paper. Costs one call of ``f`` with gradients and one vector-Jacobian
    product: the cheapest mode there is, in time and memory. The start gets no gradient.

    What is returned is ``f`` at the solver's solution, as under ``Phantom(steps=1)``, of which this is another name;
    what is said there of transforms and higher derivatives holds here.

    References:
        Fung, Heaton, Li, McKenzie, Osher and Yin, "JFB: Jacobian-free backpropagation for implicit networks", AAAI
        (2022).
    """

    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        return Phantom(steps=1).solve(f, z0, args, options)

    def evaluate(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        return Phantom(steps=1).evaluate(f, z0, args, options)

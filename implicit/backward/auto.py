"""The choice of a backward mode by the solve that it is for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from implicit.autograd.torch_internals import transform_active
from implicit.backward.backward import Backward, SolveOptions
from implicit.backward.checkpointed import Checkpointed
from implicit.backward.implicit import Implicit
from implicit.backward.unrolled import Unrolled
from solvers import Solution
from solvers.problem.hyperparameters import require_positive_int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoBackward(Backward):
    """The exact gradient, by the mode that is cheapest for the solve at hand; ``solution.backward`` says which.

    - A fixed number of steps is a function of its own, whether or not it comes near the fixed point, so its steps are
      differentiated: :class:`implicit.Unrolled` for at most ``max_unrolled`` of them, :class:`implicit.Checkpointed`
      for more (which transforms and ``torch.compile`` do not support: there it is ``Unrolled``).
    - A solve to a tolerance, or by a solver whose steps have no gradient, such as Newton-Krylov, gets
      :class:`implicit.Implicit`: its memory and time do not depend on the steps. ``solution.adjoint`` tells how well
      the linear problem was solved; one that was not is reported as ``on_failure`` says, and its gradient, the best
      that was found, is used.

    No bias but that of an unconverged solve in the second case.

    Args:
        max_unrolled: How many fixed steps to unroll, at most.
    """

    max_unrolled: int = 16

    def __post_init__(self) -> None:
        require_positive_int(self, "max_unrolled", self.max_unrolled)

    def chosen(self, options: SolveOptions) -> Backward:
        if options.tested or not options.solver.differentiable:
            return Implicit()
        if options.max_steps <= self.max_unrolled or transform_active() or torch.compiler.is_compiling():
            return Unrolled()
        return Checkpointed()

    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        return self.chosen(options).solve(f, z0, args, options)

    def evaluate(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        return self.chosen(options).evaluate(f, z0, args, options)

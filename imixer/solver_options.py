"""How an iMLP solves for its fixed point: what can be changed after training."""

import dataclasses
import math
from typing import Any

from implicit import JFB, Backward, Implicit, Phantom, get_backward
from solvers import NewtonKrylov, Solver, Steps, Stopping, StopRule, get_solver
from solvers.linear import NeumannSeries

# The error of an inner solve is noise in the map of the outer one, which has to be well below that one's tolerance.
_INNER_RTOL = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """The options of a solve, checked.

    Attributes:
        n_iter: Steps: exactly so many when ``rtol`` is None, else at most.
        solver: A solver or its name.
        backward: A backward mode or its name.
        rtol: Relative tolerance, or None for a fixed number of steps.

    Raises:
        TypeError, ValueError: A value is unfit, or the solver and the backward mode cannot go together.
    """

    n_iter: int
    solver: Solver | str
    backward: Backward | str
    rtol: float | None

    def __post_init__(self) -> None:
        if not isinstance(self.n_iter, int) or isinstance(self.n_iter, bool) or self.n_iter < 1:
            raise ValueError(f"n_iter, the number of solver steps, must be a positive integer, got {self.n_iter!r}.")
        if self.rtol is not None and not isinstance(self.rtol, (int, float)):
            raise ValueError(f"rtol must be a number >= 0 or None, got {self.rtol!r}.")
        Stopping(rtol=self.rtol)  # raises for what is unfit
        get_backward(self.backward).check(get_solver(self.solver))

    def of_layer(self, level: int) -> dict[str, Any]:
        """The arguments of the FixedPointLayer inside so many others."""
        stopping: StopRule = Steps(self.n_iter)
        if self.rtol is not None:
            stopping = Stopping(rtol=self.rtol * _INNER_RTOL**level, atol=0.0, max_steps=self.n_iter)
        return {"solver": get_solver(self.solver), "backward": get_backward(self.backward), "stopping": stopping}

    def check_depth(self, hidden_layers: int, *, joint: bool) -> None:
        """Raise a ValueError if so many hidden layers cannot be solved for in this way."""
        if not joint:
            if hidden_layers > 3 and isinstance(get_solver(self.solver), NewtonKrylov):
                raise ValueError(
                    f"{self.solver!r} differentiates the map by forward mode, which PyTorch cannot do through nested "
                    f'solves of {hidden_layers} hidden layers. Use hidden_solve="joint", or another solver.'
                )
            return
        # A call of the joint map takes the gradient of the lowest layer two layers further up.
        needed = math.ceil(hidden_layers / 2)
        if _differentiated_calls(get_backward(self.backward)) < needed:
            raise ValueError(
                f"backward={self.backward!r} differentiates too few calls of the joint map to reach the weights of all "
                f'{hidden_layers} hidden layers, which takes {needed}. Use hidden_solve="nested", or the backward mode '
                "with more steps, or Implicit()."
            )

    def changed(self, **given: Any) -> "SolverOptions":
        """The same, but for what is given; ``...`` stands for what is not."""
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not ...})


def _differentiated_calls(backward: Backward) -> float:
    """How many calls of the map in a row a backward mode follows at most; inf where it is as many as it takes."""
    match backward:
        case JFB():
            return 1
        case Phantom(steps=calls) | Implicit(linear_solver=NeumannSeries(terms=calls)):
            return calls
        case _:
            return math.inf

"""The fixed point of a map as a layer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from implicit.backward import Backward, get_backward
from implicit.functional import fixed_point
from implicit.training.iterates import iterates
from solvers import Solution, Solver, Stopping, get_solver
from solvers._failure import OnFailure
from solvers._solve import check_options
from solvers._stopping import ATOL, RTOL, get_stopping


class FixedPointLayer(nn.Module):
    """A layer whose output is the fixed point ``z = f(z, *inputs)``.

    The module form of :func:`implicit.fixed_point`; what is said there of gradients holds here. If ``f`` is a module,
    its parameters are the layer's. The parametrized weights of ``f`` are computed once a forward pass and constant
    during the solve.

    Args:
        f: The map, a module or any callable, taking the state and the inputs.
        solver: A solver such as ``Anderson(memory=5)``, or its name.
        backward: A backward mode such as ``Implicit()``, or its name.
        init: Makes the start from the inputs; by default zeros like the first input.
        rtol: Relative tolerance; with ``rtol=None, atol=None`` exactly ``max_steps`` steps are taken, untested.
        atol: Absolute tolerance, on the root mean square over a sample's entries.
        stopping: In the place of both tolerances, a :class:`solvers.Stopping`.
        max_steps: Most steps to take.
        batch_dims: How many leading dimensions of the state index independent problems.
        on_failure: "warn", "raise" or "ignore".

    Raises:
        TypeError, ValueError: An option is unfit; at construction, not at the first call.

    Example:
        >>> import torch
        >>> from implicit import FixedPointLayer
        >>> layer = FixedPointLayer(lambda z, x: 0.5 * torch.tanh(z) + x, solver="picard", rtol=1e-6)
        >>> layer(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        f: Callable[..., Any],
        *,
        solver: Solver | str = "anderson",
        backward: Backward | str = "implicit",
        init: Callable[..., Any] | None = None,
        rtol: Any = RTOL,
        atol: Any = ATOL,
        stopping: Stopping | None = None,
        max_steps: int = 50,
        batch_dims: int = 1,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__()
        if not callable(f):
            raise TypeError(f"FixedPointLayer(f) must be given a callable, got {f!r}.")
        check_options(max_steps, on_failure)
        get_stopping(rtol, atol, stopping)  # raises for what is unfit
        self.f = f
        self.solver = get_solver(solver)
        self.backward = get_backward(backward)
        self.backward.check(self.solver)
        self.init = init
        self.rtol = rtol
        self.atol = atol
        self.stopping = stopping
        self.max_steps = max_steps
        self.batch_dims = batch_dims
        self.on_failure = on_failure
        # Set by implicit.diagnostics.record_solutions while it is active.
        self._observer: Callable[[Solution], None] | None = None

    def forward(self, *inputs: Any, z0: Any = None, return_solution: bool = False) -> Any:
        """The fixed point for these inputs.

        Args:
            *inputs: Handed to ``f`` after the state.
            z0: A warm start, like the state; by default ``init(*inputs)``, or zeros like the first input.
            return_solution: Return ``(z, solution)``.

        Returns:
            The fixed point, or the pair.
        """
        if z0 is None:
            z0 = self.start(*inputs)
        z, solution = fixed_point(
            self.f,
            z0,
            *inputs,
            solver=self.solver,
            backward=self.backward,
            rtol=self.rtol,
            atol=self.atol,
            stopping=self.stopping,
            max_steps=self.max_steps,
            batch_dims=self.batch_dims,
            history=self._observer is not None,
            on_failure=self.on_failure,
            return_solution=True,
        )
        if self._observer is not None:
            self._observer(solution)
        return (z, solution) if return_solution else z

    def iterates(self, *inputs: Any, steps: Sequence[int], z0: Any = None) -> list[Any]:
        """What the layer would return after so many steps, each with a cheap gradient: :func:`implicit.iterates`.

        Args:
            *inputs: Handed to ``f`` after the state.
            steps: Numbers of steps, increasing.
            z0: As in a call of the layer.

        Returns:
            One state for each of ``steps``.
        """
        return iterates(
            self.f,
            self.start(*inputs) if z0 is None else z0,
            *inputs,
            steps=steps,
            solver=self.solver,
            rtol=self.rtol,
            atol=self.atol,
            stopping=self.stopping,
            batch_dims=self.batch_dims,
        )

    def start(self, *inputs: Any) -> Any:
        """Where the solve for these inputs starts from without ``z0``: ``init(*inputs)``, or zeros."""
        if self.init is not None:
            return self.init(*inputs)
        if not inputs or not isinstance(inputs[0], Tensor):
            came = f"a {type(inputs[0]).__name__}" if inputs else "no input"
            raise ValueError(
                f"The start is zeros like the first input, which must be a tensor; got {came}. Give z0=..., or "
                "FixedPointLayer(init=...), a callable of the inputs."
            )
        return torch.zeros_like(inputs[0])

    def extra_repr(self) -> str:
        tolerances = {"rtol": self.rtol, "atol": self.atol} if self.stopping is None else {"stopping": self.stopping}
        shown = {"solver": self.solver, "backward": self.backward, **tolerances, "max_steps": self.max_steps}
        if self.batch_dims != 1:
            shown["batch_dims"] = self.batch_dims
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

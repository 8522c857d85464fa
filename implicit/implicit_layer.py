"""What the modules share whose forward pass solves a fixed-point problem."""

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from implicit.backward import Backward, SolveOptions, get_backward
from implicit.functional import solve_with_gradient
from solvers import (
    NOT_GIVEN,
    NotGiven,
    Solution,
    Solver,
    StopRule,
    Tolerance,
    get_solver,
    stop_rule,
)
from solvers.problem import InDims, OnFailure, checked_batch_dims


def _field_of_stopping(name: str) -> Any:
    """A property that reads and replaces a field of ``self.stopping``; None where there is no such field."""

    def get(self: "ImplicitLayer") -> Any:
        return getattr(self.stopping, name, None)

    def set_(self: "ImplicitLayer", value: Any) -> None:
        self.stopping = stop_rule(default=self.stopping, **{name: value})

    return property(get, set_, doc=f"``stopping.{name}``; assigning it replaces ``stopping``.")


class ImplicitLayer(nn.Module):
    """Base of the modules whose forward pass solves a fixed-point problem, with the options of the solve.

    Attributes:
        solver: The solver.
        backward: The backward mode.
        stopping: When the solve stops: a :class:`solvers.Stopping` or :class:`solvers.Steps`.
        batch_dims: How many leading dimensions of the state index independent problems.
        compact: Whether finished samples are taken out of the calls of the map.
        in_dims: With ``compact``, which dimension of each input indexes the samples.
        compiled: Whether the loop of the solve runs as one compiled graph.
        on_failure: "warn", "raise" or "ignore".
    """

    rtol = _field_of_stopping("rtol")
    atol = _field_of_stopping("atol")
    max_steps = _field_of_stopping("max_steps")

    def __init__(
        self,
        *,
        solver: Solver | str,
        backward: Backward | str,
        stopping: StopRule,
        batch_dims: int,
        compact: bool,
        in_dims: InDims,
        on_failure: OnFailure,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.solver = get_solver(solver)
        self.backward = get_backward(backward)
        self.backward.check(self.solver)
        self.stopping: StopRule = stopping
        self.batch_dims = checked_batch_dims(batch_dims)
        self.compact = compact
        self.in_dims = in_dims
        self.compiled = compile
        self.on_failure: OnFailure = on_failure
        self._name_in_model = ""
        self._options()  # raises for what is not valid

    def _options(self, stopping: StopRule | None = None) -> SolveOptions:
        return SolveOptions(
            solver=self.solver,
            stopping=stopping or self.stopping,
            batch_dims=self.batch_dims,
            compact=self.compact,
            in_dims=self.in_dims,
            compile=self.compiled,
            on_failure=self.on_failure,
            layer="" if torch.compiler.is_compiling() else self._described(),
        )

    def _solve(
        self,
        f: Callable[..., Any],
        z0: Any,
        inputs: tuple[Any, ...],
        *,
        stopping: StopRule | None = None,
        rtol: Tolerance = NOT_GIVEN,
        atol: Tolerance = NOT_GIVEN,
        max_steps: int | NotGiven = NOT_GIVEN,
    ) -> Solution[Any]:
        """The solution of ``z = f(z, *inputs)`` by the layer's options, with another stopping if it is given."""
        rule = stop_rule(stopping, rtol=rtol, atol=atol, max_steps=max_steps, default=self.stopping)
        return solve_with_gradient(f, z0, inputs, self.backward, self._options(rule), owner=self)

    def _described(self) -> str:
        """What the layer is called in messages, by its name in the model that is running; empty without one."""
        if not self._name_in_model:
            self._name_in_model = _name_in_running_model(self)
        return f"the {type(self).__name__} {self._name_in_model!r}" if self._name_in_model else ""

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {"solver": self.solver, "backward": self.backward, "stopping": self.stopping}
        if self.batch_dims != 1:
            shown["batch_dims"] = self.batch_dims
        if self.compact:
            shown["compact"] = True
        if self.compiled:
            shown["compile"] = True
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def running_modules() -> Iterator[nn.Module]:
    """The modules of which a method runs in this thread, inside of a call of a module, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    # Before Python 3.13 a frame of which the variables were read keeps them for as long as it runs. So only those are
    # read that end with the call of a module.
    inside: list[FrameType] = []
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            inside.append(frame)
        if frame.f_globals is vars(torch.nn.modules.module):
            owners = [method.f_locals.get("self") for method in inside]
            yield from (owner for owner in owners if isinstance(owner, nn.Module))
            inside = []
        frame = frame.f_back


def _name_in_running_model(module: nn.Module) -> str:
    """The name of ``module`` in the outermost module that is running."""
    found = ""
    for owner in dict.fromkeys(running_modules()):
        if owner is not module:
            found = next((name for name, child in owner.named_modules() if child is module), found)
    return found

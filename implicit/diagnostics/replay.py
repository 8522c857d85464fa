"""A solve that can be made again with other settings."""

import contextlib
import dataclasses
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from implicit.autograd.modules_used import modules_used_by
from implicit.backward import Backward, SolveOptions
from implicit.diagnostics.observed_map import restored
from solvers import NOT_GIVEN, Picard, Solution, Solver, Stopping
from solvers.problem import FlatMap, Layout

# The most solves of one name that one diagnosis makes, with those of the model itself.
MOST_SOLVES = 20


@dataclasses.dataclass(frozen=True)
class Setting:
    """What differs from the settings of the solve; None where nothing does.

    Attributes:
        solver: The solver.
        max_steps: The largest number of steps.
        rtol: The relative tolerance.
        batch_dims: How many leading dimensions index independent problems.
        start: A state to start from, and the code that makes it.
        evaluating: Modules of the map that are in eval mode, and their names.
        patient: Whether no sample ends because its residual has not fallen for long.
    """

    solver: Solver | None = None
    max_steps: int | None = None
    rtol: float | None = None
    batch_dims: int | None = None
    start: tuple[str, Any] | None = None
    evaluating: tuple[tuple[str, nn.Module], ...] = ()
    patient: bool = False

    def written(self, rule: Stopping) -> str:
        """The setting as it is written in a program that stops by ``rule``."""
        options: dict[str, Any] = {"solver": self.solver, "rtol": self.rtol, "max_steps": self.max_steps}
        if self.patient:  # only Stopping has this option
            options = {"solver": self.solver, "stopping": self.stopping(rule)}
        options["batch_dims"] = self.batch_dims
        code = [f"{name}={_short(value)}" for name, value in options.items() if value is not None]
        code += [self.start[0]] if self.start else []
        if self.evaluating:
            code.append(f"{', '.join(name for name, _ in self.evaluating)} in eval mode")
        return ", ".join(code)

    def stopping(self, rule: Stopping) -> Stopping:
        """``rule`` with what differs."""
        changes = {name: value for name in ("rtol", "max_steps") if (value := getattr(self, name)) is not None}
        rule = dataclasses.replace(rule, **changes)
        return dataclasses.replace(rule, patience=rule.max_steps) if self.patient else rule


@dataclasses.dataclass
class Replay:
    """A solve with everything that it depends on.

    Attributes:
        f: The map, or the function whose root is sought.
        z0: The start.
        inputs: The other arguments of ``f``.
        backward: The backward mode.
        options: The options.
        start_option: What the option is called that sets the start: ``"init"`` of a layer, ``"z0"`` of a call.
        num_solves: The number of solves so far, with those that the model itself made.
    """

    f: Callable[..., Any]
    z0: Any
    inputs: tuple[Any, ...]
    backward: Backward
    options: SolveOptions
    start_option: str
    num_solves: int = 0

    def __post_init__(self) -> None:
        self.z0, self.inputs = tree_map_only(Tensor, torch.Tensor.detach, (self.z0, self.inputs))
        self.layout = Layout(self.z0, self.options.batch_dims)
        self.start = self.layout.pack(self.z0)  # (B, D)
        self._flat = FlatMap(self.f, self.inputs, self.layout)
        self.options = dataclasses.replace(self.options, stopping=self.options.stopping.resolved(self._flat.eps))

    def flat(self, z: Tensor) -> Tensor:
        """The map, or the function whose root is sought, on (B, D)."""
        return self._flat(z)

    @property
    def is_plain(self) -> bool:
        """Whether the solve takes plain steps."""
        return self.options.solver == Picard()

    @property
    def tested(self) -> Stopping:
        """When the solve stops; by the default tolerances where it takes a fixed number of steps."""
        rule = self.options.stopping
        if isinstance(rule, Stopping):
            return rule
        return Stopping(max_steps=max(rule.max_steps, 50)).resolved(self._flat.eps)

    def asked(self, size: Tensor) -> Tensor:
        """(B,) the relative residual that the tolerances ask for, given the size of the state."""
        rule = self.tested
        absolute = float(rule.atol) if isinstance(rule.atol, numbers.Real) else 0.0
        return torch.clamp(absolute / size.double().cpu().clamp_min(1e-300), min=rule.relative or 0.0)

    @property
    def rtol(self) -> float | None:
        """The relative tolerance, if one number is given and it alone decides."""
        rule = self.options.stopping
        if not isinstance(rule, Stopping) or not (rule.atol is NOT_GIVEN or rule.atol in (None, 0)):
            return None
        return float(rule.rtol) if isinstance(rule.rtol, numbers.Real) else None

    def has_room(self) -> bool:
        """Whether another solve is within the limit."""
        return self.num_solves < MOST_SOLVES

    def run(self, setting: Setting) -> Solution[Any]:
        """Solve with a setting."""
        self.num_solves += 1
        rule = setting.stopping(self.tested)
        options = dataclasses.replace(self.options, stopping=rule, history=False, compact=False)
        if setting.solver is not None:
            options = dataclasses.replace(options, solver=setting.solver)
        if setting.batch_dims is not None:
            options = dataclasses.replace(options, batch_dims=setting.batch_dims, chunk_size=None)
        with evaluating([module for _, module in setting.evaluating]):
            return options.solve(self.f, setting.start[1] if setting.start else self.z0, self.inputs)

    def restored(self) -> contextlib.AbstractContextManager[None]:
        """Restore the modules' tensors and random number generators on leaving the context."""
        return restored(modules_used_by(self.f), self.layout.device)

    def allows(self, solver: Solver | None) -> bool:
        """Whether the backward mode goes with a solver."""
        try:
            self.backward.check(solver or self.options.solver)
        except ValueError:
            return False
        return True


@contextlib.contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules in eval mode, without those inside them."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _short(value: Any) -> str:
    """``Anderson(memory=5)``: a solver with what it remembers and the options that are not the default; or a number."""
    if not isinstance(value, Solver) or not dataclasses.is_dataclass(value):
        return f"{value:g}" if isinstance(value, float) else repr(value)
    shown = [
        f"{field.name}={option!r}"
        for field in dataclasses.fields(value)
        if (option := getattr(value, field.name)) != field.default or (field.name == "memory" and option is not None)
    ]
    return f"{type(value).__name__}({', '.join(shown)})"

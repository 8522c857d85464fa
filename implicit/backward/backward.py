"""What a backward mode is: how the solution of a fixed-point problem gets its gradient."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

from torch.utils._pytree import TreeSpec

from implicit.autograd.constant_weights import constant_weights
from implicit.autograd.torch_internals import transform_active
from implicit.autograd.traced_map import MapInForce
from solvers import Iteration, Solution, Solver, Stopping, StopRule, solve_root
from solvers.problem import Hyperparameters, InDims, OnFailure, Traceable, check_compile, check_on_failure


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """The options of :func:`solvers.solve` for one solve, and the layer that it belongs to, as messages call it.

    With ``root`` the problem is ``f(z, *args) = 0`` instead of ``z = f(z, *args)``.
    """

    solver: Solver
    stopping: StopRule = Stopping()  # noqa: RUF009
    batch_dims: int = 1
    history: bool = False
    compact: bool = False
    in_dims: InDims = 0
    on_failure: OnFailure = "warn"
    layer: str = ""
    root: bool = False
    chunk_size: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        check_on_failure(self.on_failure)
        check_compile(self.compile, compact=self.compact)

    @property
    def tested(self) -> bool:
        """Whether convergence is tested: False for a fixed number of steps."""
        return isinstance(self.stopping, Stopping)

    @property
    def max_steps(self) -> int:
        """The largest number of steps."""
        return self.stopping.max_steps

    @property
    def linear_rtol(self) -> float | None:
        """The relative tolerance of the linear solves of derivatives: a tenth of that of the solve, if it has one."""
        rtol = self.stopping.relative if isinstance(self.stopping, Stopping) else None
        return None if rtol is None else 0.1 * rtol

    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...] = ()) -> Solution[Any]:
        """``solvers.solve`` with these options."""
        if self.root:
            f, compile = self._to_compile(f)
            return solve_root(
                f,
                z0,
                self.solver,
                args=args,
                stopping=self.stopping,
                batch_dims=self.batch_dims,
                history=self.history,
                compact=self.compact,
                in_dims=self.in_dims,
                chunk_size=self.chunk_size,
                compile=compile,
                on_failure=self.on_failure,
                what=self.named(self.what),
            )
        return self.iteration(f, z0, args).run(self.on_failure, what=self.named(self.what))

    @property
    def what(self) -> str:
        """What messages call the solve."""
        return "The root solve" if self.root else "The fixed-point solve"

    def iteration(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...] = ()) -> Iteration[Any]:
        """The same solve, to be driven by hand."""
        f, compile = self._to_compile(f)
        return Iteration(
            f,
            z0,
            self.solver,
            args=args,
            stopping=self.stopping,
            batch_dims=self.batch_dims,
            history=self.history,
            compact=self.compact,
            in_dims=self.in_dims,
            compile=compile,
            root=self.root,
        )

    def _to_compile(self, f: Callable[..., Any]) -> tuple[Callable[..., Any], bool]:
        """The map as a solve with ``compile`` takes it, and that option."""
        # What transforms wrap is not compiled.
        compile = self.compile and not transform_active()
        return MapInForce(f) if compile and not isinstance(f, Traceable) else f, compile

    def named(self, what: str) -> str:
        """What a message says of something that belongs to the solve."""
        return f"{what} of {self.layer}" if self.layer else what

    def for_leaves(self, spec: TreeSpec, batch_dims: int) -> "SolveOptions":
        """The same for the list of the leaves of a state of this structure, with so many batch dimensions.

        The map's tensors are not its arguments then, so that finished samples cannot be taken out of them.
        """
        stopping = self.stopping.flattened(spec)
        return dataclasses.replace(self, stopping=stopping, batch_dims=batch_dims, compact=False, chunk_size=None)


class Backward(Hyperparameters, abc.ABC):
    """A backward mode: a frozen, keyword-only dataclass of its hyperparameters, independent of the solver."""

    def check(self, solver: Solver) -> None:
        """Raise a ValueError that names both if this mode cannot go with a solver."""

    def chosen(self, options: SolveOptions) -> "Backward":
        """The mode that makes the gradient of such a solve: this one, but for a mode that chooses among others."""
        return self

    @abc.abstractmethod
    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        """Solve ``z = f(z, *args)``; ``solution.value`` carries the gradient."""

    def evaluate(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        """The same value and status for a call of which no derivative is taken.

        This one is the solver's solution. A mode whose value is another one overrides it.
        """
        with constant_weights():
            return options.solve(f, z0, args)


def require_differentiable(mode: Backward, solver: Solver) -> None:
    """Raise a ValueError, for a mode that differentiates the solver's steps, if no gradients flow through them."""
    if not solver.differentiable:
        raise ValueError(
            f"{mode!r} needs gradients through the steps of the solver, and none flow through those of {solver!r}. "
            "Use the implicit backward mode, or Picard, Anderson or Broyden."
        )

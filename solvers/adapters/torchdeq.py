"""The solvers of torchdeq, https://github.com/locuslab/torchdeq."""

import abc
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from solvers.adapters._foreign import ForeignSolve, ForeignSolver, Progress
from solvers.problem.hyperparameters import require_damping, require_positive, require_positive_int


class TorchDEQSolver(ForeignSolver):
    """Base of the adapters: one solver of torchdeq runs on the whole batch.

    It mixes the rows only in its stopping tests, which are off, and in the line search of its Broyden method, which is
    left out.
    """

    _name: ClassVar[str]

    def __post_init__(self) -> None:
        self._function()

    @abc.abstractmethod
    def _options(self) -> dict[str, Any]:
        """The options of torchdeq's function."""

    def _function(self) -> Callable[..., Any]:
        try:
            from torchdeq.solver import get_solver
        except ImportError as error:
            raise ImportError(
                f"{type(self).__name__} needs torchdeq: pip install 'implicit-layers[torchdeq]'"
            ) from error
        function: Callable[..., Any] = get_solver(self._name)
        return function

    def _begin(self) -> Progress:
        return _BatchProgress(self._run)

    def _run(self, z0: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        def func(z: Tensor, tau: float = 1.0) -> Tensor:
            return f(z) if tau == 1.0 else tau * f(z) + (1 - tau) * z

        # PyTorch keeps the gradient mode and the current stream of the device per thread.
        stream = torch.cuda.current_stream(z0.device) if z0.is_cuda else None
        with torch.no_grad(), torch.cuda.stream(stream):
            # A negative tolerance switches the stopping test off.
            value: Tensor = self._function()(func, z0, max_iter=sys.maxsize, tol=-1.0, **self._options())[0]
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchDEQFixedPointIter(TorchDEQSolver):
    """torchdeq's ``fixed_point_iter``: the iterates of :class:`solvers.Picard`.

    Args:
        damping: Step length in (0, 1], torchdeq's ``tau``.
    """

    _name: ClassVar[str] = "fixed_point_iter"

    damping: float = 1.0

    def __post_init__(self) -> None:
        require_damping(self, self.damping)
        super().__post_init__()

    def _options(self) -> dict[str, Any]:
        return {"tau": self.damping}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchDEQSimpleFixedPointIter(TorchDEQFixedPointIter):
    """torchdeq's ``simple_fixed_point_iter``: the same iterates without the bookkeeping.

    Args:
        damping: Step length in (0, 1], torchdeq's ``tau``.
    """

    _name: ClassVar[str] = "simple_fixed_point_iter"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchDEQAnderson(TorchDEQSolver):
    """torchdeq's ``anderson``: Anderson acceleration with a ridge of fixed size.

    Use it for tolerances above the ridge: once the squared residuals of a row are below it, the ridge dominates the
    least-squares problem, and the step is the mean of the last ones. :class:`solvers.Anderson` has no such floor.

    Args:
        memory: How many iterates to keep, at least 2; torchdeq's ``m``.
        damping: Mixing factor in (0, 1], torchdeq's ``tau``.
        ridge: Number added to the diagonal of the Gram matrix, in the units of squared residuals; torchdeq's ``lam``.
    """

    _name: ClassVar[str] = "anderson"

    memory: int = 6
    damping: float = 1.0
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        require_positive_int(self, "memory", self.memory, least=2)
        if self.ridge != 0:
            require_positive(self, "ridge", self.ridge)
        require_damping(self, self.damping)
        super().__post_init__()

    def _options(self) -> dict[str, Any]:
        return {"m": self.memory, "tau": self.damping, "lam": self.ridge}

    def _run(self, z0: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        with _UncheckedSolve():
            return super()._run(z0, f)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchDEQBroyden(TorchDEQSolver):
    """torchdeq's ``broyden``: Broyden's first method, without a line search.

    Args:
        memory: How many updates to keep, torchdeq's ``LBFGS_thres``; further ones replace the oldest. Twice as many
            vectors of the state's size are allocated at the start.
    """

    _name: ClassVar[str] = "broyden"

    memory: int = 50

    def __post_init__(self) -> None:
        require_positive_int(self, "memory", self.memory)
        super().__post_init__()

    def _options(self) -> dict[str, Any]:
        return {"LBFGS_thres": self.memory}


class _BatchProgress(Progress):
    """One solve of the whole batch. Samples that have left the batch stay in it, with their own point as the image."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        self._run = run
        self._solve: ForeignSolve[Tensor] | None = None
        # The positions of the samples that are still in the batch; None for all.
        self._rows: Tensor | None = None

    def advance(self, z: Tensor, fz: Tensor) -> Tensor:
        if len(z) == 0:
            return z
        if self._solve is None:
            self._solve = ForeignSolve(functools.partial(self._run, z.detach()))
        image = fz.detach()
        if self._rows is not None:
            image = self._solve.point.index_copy(0, self._rows, image)
        self._solve.resume(image)
        return self._solve.point if self._rows is None else self._solve.point[self._rows]

    def select(self, keep: Tensor) -> Self:
        if self._solve is not None:
            self._rows = keep if self._rows is None else self._rows[keep]
        return self

    def close(self) -> None:
        if self._solve is not None:
            self._solve.close()
        self._solve = self._rows = None


class _UncheckedSolve(TorchFunctionMode):
    """Makes ``torch.linalg.solve`` return a row that is not finite for a singular matrix, instead of raising."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))

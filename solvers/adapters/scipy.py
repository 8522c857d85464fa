"""The methods of ``scipy.optimize.root``."""

import abc
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from solvers.adapters._foreign import ForeignSolve, ForeignSolver, Progress
from solvers.problem.hyperparameters import require_positive, require_positive_int

if TYPE_CHECKING:
    import numpy as np

    Vector = np.ndarray[tuple[int], np.dtype[np.float64]]

# Each row has a thread.
MOST_ROWS = 1024


class SciPySolver(ForeignSolver):
    """Base of the adapters: ``scipy.optimize.root`` runs for each row, and all rows advance together.

    Each of these solvers seeks a root of ``f(z) - z`` for one vector in float64 on the CPU. A step takes every row's
    solver to its next call of the map, and calls ``f`` once for all of them, in the dtype and on the device of the
    state.
    """

    _method: ClassVar[str]
    # 1 if the method is given f(z) - z, -1 if it is given z - f(z).
    _sign: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self._root()

    @abc.abstractmethod
    def _options(self, eps: float) -> dict[str, Any]:
        """The options of the method, for a map whose results have the precision ``eps``."""

    def _root(self) -> Callable[..., Any]:
        try:
            from scipy.optimize import root
        except ImportError as error:
            name = type(self).__name__
            raise ImportError(f"{name} needs SciPy: pip install 'implicit-layers[scipy]'") from error
        function: Callable[..., Any] = root
        return function

    def _begin(self) -> Progress:
        return _RowsProgress(self._run)

    def _run(self, z0: "Vector", eps: float, residual: "Callable[[Vector], Vector]") -> "Vector | None":
        """The answer for one row; None if SciPy gives up with a numerical error."""
        import numpy as np

        def signed(z: "Vector") -> "Vector":
            return self._sign * residual(z)

        with np.errstate(all="ignore"):
            try:
                answer: Vector = self._root()(signed, z0, method=self._method, options=self._options(eps)).x
            except (ArithmeticError, ValueError):
                return None
        return answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class SciPyAnderson(SciPySolver):
    """SciPy's ``anderson``: extended Anderson mixing with a line search.

    Args:
        memory: How many differences to keep, SciPy's ``M``.
        damping: Step length while there are no differences, SciPy's ``alpha``: 1 is a Picard step. None leaves it to
            SciPy, which derives it from the sizes of the start and of its residual.
        w0: Regularization: each diagonal entry of the Gram matrix is multiplied by 1 + w0^2.
        line_search: How the length of a step is chosen; None takes every step whole.
    """

    _method: ClassVar[str] = "anderson"

    memory: int = 5
    damping: float | None = 1.0
    w0: float = 0.01
    line_search: Literal["armijo", "wolfe"] | None = "armijo"

    def __post_init__(self) -> None:
        require_positive_int(self, "memory", self.memory)
        require_positive(self, "damping", self.damping, optional=True)
        _require_one_of(self, "line_search", self.line_search, ("armijo", "wolfe", None))
        super().__post_init__()

    def _options(self, eps: float) -> dict[str, Any]:
        return _without_tests(self.line_search, alpha=self.damping, M=self.memory, w0=self.w0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SciPyBroyden1(SciPySolver):
    """SciPy's ``broyden1``: Broyden's first method with a line search.

    Args:
        memory: How many updates to keep, SciPy's ``max_rank``, at least 2; None keeps all.
        damping: Step length before the first update, SciPy's ``alpha``: 1 is a Picard step. None leaves it to SciPy,
            which derives it from the sizes of the start and of its residual.
        reduction_method: Which updates to drop when there are ``memory``: "restart" drops all of them, "simple" the
            oldest, "svd" the least important.
        line_search: How the length of a step is chosen; None takes every step whole.
    """

    _method: ClassVar[str] = "broyden1"

    memory: int | None = None
    damping: float | None = 1.0
    reduction_method: Literal["restart", "simple", "svd"] = "restart"
    line_search: Literal["armijo", "wolfe"] | None = "armijo"

    def __post_init__(self) -> None:
        require_positive_int(self, "memory", self.memory, optional=True, least=2)
        require_positive(self, "damping", self.damping, optional=True)
        _require_one_of(self, "reduction_method", self.reduction_method, ("restart", "simple", "svd"))
        _require_one_of(self, "line_search", self.line_search, ("armijo", "wolfe", None))
        super().__post_init__()

    def _options(self, eps: float) -> dict[str, Any]:
        return _without_tests(
            self.line_search, alpha=self.damping, max_rank=self.memory, reduction_method=self.reduction_method
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SciPyKrylov(SciPySolver):
    """SciPy's ``krylov``: inexact Newton's method, with Jacobian products by differences of the map.

    Each product is a call of ``f`` and hence a step; :class:`solvers.NewtonKrylov` computes exact products.

    Args:
        method: The solver of the linear systems.
        inner_maxiter: Limit on the iterations of a linear solve; "lgmres" always makes 30 plus ``outer_k``.
        outer_k: How many vectors "lgmres" keeps from one linear solve to the next.
        rdiff: Relative length of the differences; None is the square root of the state's machine epsilon.
        line_search: How the length of a step is chosen; None takes every step whole.
    """

    _method: ClassVar[str] = "krylov"

    method: Literal["lgmres", "gmres", "bicgstab", "cgs", "minres", "tfqmr"] = "lgmres"
    inner_maxiter: int = 20
    outer_k: int = 10
    rdiff: float | None = None
    line_search: Literal["armijo", "wolfe"] | None = "armijo"

    def __post_init__(self) -> None:
        _require_one_of(self, "method", self.method, ("lgmres", "gmres", "bicgstab", "cgs", "minres", "tfqmr"))
        require_positive_int(self, "inner_maxiter", self.inner_maxiter)
        require_positive_int(self, "outer_k", self.outer_k)
        require_positive(self, "rdiff", self.rdiff, optional=True)
        _require_one_of(self, "line_search", self.line_search, ("armijo", "wolfe", None))
        super().__post_init__()

    def _options(self, eps: float) -> dict[str, Any]:
        return _without_tests(
            self.line_search,
            method=self.method,
            inner_maxiter=self.inner_maxiter,
            outer_k=self.outer_k,
            rdiff=eps**0.5 if self.rdiff is None else self.rdiff,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SciPyDFSane(SciPySolver):
    """SciPy's ``df-sane``: steps along the residual with lengths from the last difference and a line search.

    It is given ``z - f(z)``, so that its first step is a Picard step.

    Args:
        memory: How many of the last residuals the line search compares with, SciPy's ``M``.
        sigma_0: The first step length.
        sigma_eps: Step lengths are clipped to the range from this to its inverse.
        line_search: "cruz" or "cheng".
    """

    _method: ClassVar[str] = "df-sane"
    _sign: ClassVar[int] = -1

    memory: int = 10
    sigma_0: float = 1.0
    sigma_eps: float = 1e-10
    line_search: Literal["cruz", "cheng"] = "cruz"

    def __post_init__(self) -> None:
        require_positive_int(self, "memory", self.memory)
        require_positive(self, "sigma_0", self.sigma_0)
        require_positive(self, "sigma_eps", self.sigma_eps)
        _require_one_of(self, "line_search", self.line_search, ("cruz", "cheng"))
        super().__post_init__()

    def _options(self, eps: float) -> dict[str, Any]:
        return {
            "M": self.memory,
            "sigma_0": self.sigma_0,
            "sigma_eps": self.sigma_eps,
            "line_search": self.line_search,
            # It stops at a residual of zero, by which it would divide next.
            "ftol": 0.0,
            "maxfev": sys.maxsize,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class SciPyHybr(SciPySolver):
    """SciPy's ``hybr``: Powell's hybrid method, MINPACK's ``hybrd``, with the whole Jacobian.

    Use it for small and hard problems, of up to 48 entries per sample: each column of the Jacobian takes one call of
    ``f``, and hence one step. Meanwhile the residual hardly falls, and :func:`solvers.solve` reports a sample as
    STAGNATED if its residual has not fallen for 50 steps.

    Args:
        eps: The relative precision of the map, which determines the length of the differences; None is the machine
            epsilon of the state.
        factor: The first bound on the step, in units of the size of the start; between 0.1 and 100.
    """

    _method: ClassVar[str] = "hybr"

    eps: float | None = None
    factor: float = 100.0

    def __post_init__(self) -> None:
        require_positive(self, "eps", self.eps, optional=True)
        require_positive(self, "factor", self.factor)
        if not 0.1 <= self.factor <= 100:
            raise ValueError(f"SciPyHybr(factor=...) must be in [0.1, 100], got {self.factor!r}.")
        super().__post_init__()

    def _options(self, eps: float) -> dict[str, Any]:
        # maxfev is a C int.
        return {"eps": self.eps or eps, "factor": self.factor, "xtol": 0.0, "maxfev": 2**31 - 1}


class _RowsProgress(Progress):
    """One solve for each row."""

    def __init__(self, run: "Callable[..., Vector | None]") -> None:
        self._run = run
        self._solves: list[ForeignSolve[Vector | None]] | None = None

    def advance(self, z: Tensor, fz: Tensor) -> Tensor:
        # SciPy's points are float64. For a state of another dtype they are rounded, and the residual is that at z.
        points = z.detach().to("cpu", torch.float64, copy=True)
        residuals = (fz.detach().to("cpu", torch.float64) - points).numpy()
        if self._solves is None:
            self._solves = self._started(points, torch.finfo(z.dtype).eps)
        for solve, residual, row in zip(self._solves, residuals, points.numpy(), strict=True):
            solve.resume(residual)
            if solve.point is not None:
                row[:] = solve.point
        return points.to(z.device, z.dtype)

    def _started(self, z0: Tensor, eps: float) -> "list[ForeignSolve[Vector | None]]":
        if len(z0) > MOST_ROWS:
            raise ValueError(
                f"SciPy's solvers take at most {MOST_ROWS} samples at once, a thread for each, and got {len(z0)}. "
                "Solve the batch in parts, or use a solver of ours."
            )
        return [ForeignSolve(functools.partial(self._run, row.copy(), eps)) for row in z0.numpy()]

    def select(self, keep: Tensor) -> Self:
        if self._solves is not None:
            # The other solves end when they are collected.
            self._solves = [self._solves[i] for i in keep.tolist()]
        return self

    def close(self) -> None:
        for solve in self._solves or []:
            solve.close()
        self._solves = None


def _without_tests(line_search: str | None, **jac_options: Any) -> dict[str, Any]:
    """Options with which SciPy's Newton-type methods stop only at a residual of zero."""
    return {"line_search": line_search, "fatol": 0.0, "maxiter": sys.maxsize, "jac_options": jac_options}


def _require_one_of(owner: object, name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        choices = ", ".join(repr(choice) for choice in known)
        raise ValueError(f"{type(owner).__name__}({name}=...) must be one of {choices}, got {value!r}.")

"""Invertible residual blocks: x + g(x) with a contraction g, the inverse, and the log-determinant."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from implicit.autograd.constant_weights import constant_weights
from implicit.autograd.torch_internals import transform_active
from implicit.backward import Backward, get_backward
from implicit.diagnostics.modules_used import modules_used_by
from implicit.functional import fixed_point
from solvers import ConvergenceError, ConvergenceWarning, Solution, Solver, Status, get_solver
from solvers._failure import OnFailure
from solvers._solve import check_options
from solvers._stopping import get_stopping
from solvers.problem.hyperparameters import Hyperparameters, require_positive_int
from solvers.problem.layout import Layout

# g on a flat problem, (B, D) -> (B, D).
FlatMapping = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactLogDet(Hyperparameters):
    """``log|det(I + J)|`` of the dense Jacobian J = dg/dx of each sample.

    For samples of few entries D, a hundred or so: costs one call of g, D vector-Jacobian products in one batch, and an
    LU decomposition of a (D, D) matrix a sample; for the gradient, D times the memory of a call.
    """

    def run(self, g: FlatMapping, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """``g(x)`` (B, D), the log-determinants (B,), and whether each is sound (B,) bool: its determinant positive."""
        gx, pullback = torch.func.vjp(g, x)[:2]
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        rows = torch.func.vmap(lambda row: pullback(row.expand_as(x))[0])(eye)  # (D, B, D)
        sign, log_det = torch.linalg.slogdet(eye + rows.transpose(0, 1))
        return gx, log_det, sign > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerSeriesLogDet(Hyperparameters):
    """An estimate of ``log det(I + J)``, with J = dg/dx, from products with J alone.

        log det(I + J)  =  sum_{k >= 1} (-1)^(k + 1) tr(J^k) / k,        tr(J^k) = E[v' J^k v],

    v of independent random signs (Hutchinson's estimator). By default the series is cut off after ``terms`` terms,
    which biases the estimate by no more than :meth:`bias_bound` says. With ``continuation`` p > 0 each sample takes
    one more term with probability p, then another one, and so on (Russian roulette); a term that is reached with
    probability p^j is divided by it, so that the estimate is unbiased. Its variance is finite if ``Lip(g)^2 < p``.

    The gradient is that of the estimate with the same signs: unbiased where the estimate is. Costs one call of g and
    ``num_samples`` vector-Jacobian products a term; for the gradient a double backward pass through all of them, which
    are kept for it. ``torch.utils.checkpoint.checkpoint(..., use_reentrant=True)`` around a block keeps its input
    alone. Under roulette a batch takes as many terms as the sample that takes the most, about
    ``terms + log(B) / log(1 / p)``.

    Args:
        terms: Terms that are always taken.
        num_samples: Random vectors to average over. In training one does: the noise averages out over batches.
        continuation: p in [0, 1), the probability of each further term; 0 cuts the series off.

    References:
        Behrmann, Grathwohl, Chen, Duvenaud and Jacobsen, "Invertible residual networks", ICML (2019), section 3.
        Chen, Behrmann, Duvenaud and Jacobsen, "Residual flows for invertible generative modeling", NeurIPS (2019),
        theorem 1.

    Example:
        >>> from implicit import PowerSeriesLogDet
        >>> f"{PowerSeriesLogDet(terms=8).bias_bound(0.5, size=2):.4f}"
        '0.0009'
    """

    terms: int = 8
    num_samples: int = 1
    continuation: float = 0.0

    def __post_init__(self) -> None:
        require_positive_int(self, "terms", self.terms)
        require_positive_int(self, "num_samples", self.num_samples)
        if not 0 <= self.continuation < 1:
            raise ValueError(f"PowerSeriesLogDet(continuation=...) must be in [0, 1), got {self.continuation!r}.")

    def bias_bound(self, contraction: float, size: int) -> float:
        """A bound on the error of the estimate's mean: ``D q^(n + 1) / ((n + 1) (1 - q))`` after n terms.

        That is because ``|tr(J^k)| <= D q^k``. With roulette there is no bias.

        Args:
            contraction: q in [0, 1), a bound on the Lipschitz constant of g.
            size: D, the number of entries of a sample.

        Raises:
            ValueError: q is not in [0, 1).
        """
        if not 0 <= contraction < 1:
            raise ValueError(f"bias_bound needs a contraction factor in [0, 1), got {contraction!r}.")
        n = self.terms
        return 0.0 if self.continuation else size * contraction ** (n + 1) / ((n + 1) * (1 - contraction))

    def run(self, g: FlatMapping, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """``g(x)`` (B, D), the estimates (B,), and whether each is sound (B,) bool: the products have not grown."""
        gx, pullback = torch.func.vjp(g, x)[:2]
        product = torch.func.vmap(lambda u: pullback(u)[0])
        bits = torch.randint(2, (self.num_samples, *x.shape), generator=generator, dtype=x.dtype, device=x.device)
        signs = 2 * bits - 1  # (num_samples, B, D)
        further, last = None, self.terms
        if self.continuation:
            further = torch.empty_like(signs[..., 0]).geometric_(1 - self.continuation, generator=generator) - 1
            last += int(max(further.flatten().tolist(), default=0))
        u, total = signs, torch.zeros_like(signs[..., 0])  # (num_samples, B), further as well
        for k in range(1, last + 1):
            u = product(u)
            term = (u * signs).sum(dim=-1) / (k if k % 2 else -k)
            if further is not None and k > self.terms:
                j = k - self.terms
                term = torch.where(further >= j, term / self.continuation**j, 0.0)
            total = total + term
        with torch.no_grad():
            sound = (u.square().sum(dim=-1) <= x.shape[1]).all(dim=0)
        return gx, total.mean(dim=0), sound


class InvertibleResidual(nn.Module):
    """The residual block ``y = x + g(x)`` with a contraction g, which makes it invertible.

    If ``Lip(g) < 1``, the inverse is the one fixed point of ``x = y - g(x)``, and ``log det dy/dx``, which is
    ``log det(I + dg/dx)``, is finite: what normalizing flows are made of. Keeping that bound is up to you:
    :func:`implicit.spectral_norm` bounds linear layers, and the largest slopes of the activations multiply its bounds.
    Where g does not contract there need not be an inverse. A solve that does not converge is reported as ``on_failure``
    says, and so is a log-determinant that shows it.

    In training mode spectral normalization advances its power iteration whenever the weights are computed, which is
    once in each call of the block, of ``log_det`` and of ``inverse``. Until it has settled, two calls are of slightly
    different maps. In eval mode, and inside ``with torch.nn.utils.parametrize.cached():``, they are of the same one.

    Under autocast g runs in the lower precision, and the inverse is that of the map so rounded; sums, the solver's
    algebra and log-determinants are in float32 at least.

    Args:
        g: The map, a module or any callable, taking x and the block's further inputs. It must not mix samples, and its
            output must have the shape of x.
        estimator: How the log-determinant is computed: :class:`ExactLogDet` or :class:`PowerSeriesLogDet`.
        solver: A solver of the inverse, such as ``Anderson(memory=10)``, or its name.
        backward: The backward mode of the inverse, or its name.
        rtol: Relative tolerance of the inverse; with ``rtol=None, atol=None`` exactly ``max_steps`` steps are taken.
        atol: Absolute tolerance, on the root mean square over a sample's entries. The error of x can be larger than the
            residual by 1 / (1 - Lip(g)); ``solution.error_bound`` bounds it.
        max_steps: Most steps of the solver.
        batch_dims: How many leading dimensions of x index samples; the others are the event, of any shape.
        on_failure: "warn", "raise" or "ignore".

    Raises:
        TypeError, ValueError: An option is unfit.

    References:
        Behrmann, Grathwohl, Chen, Duvenaud and Jacobsen, "Invertible residual networks", ICML (2019), theorem 1 and
        algorithm 1.

    Example:
        >>> import torch
        >>> from implicit import InvertibleResidual
        >>> block = InvertibleResidual(lambda x: 0.5 * torch.sin(x))
        >>> x = torch.randn(4, 2)
        >>> y, log_det = block(x, return_log_det=True)
        >>> torch.allclose(block.inverse(y), x, atol=1e-5)
        True
        >>> torch.allclose(log_det, (1 + 0.5 * x.cos()).log().sum(dim=1))
        True
    """

    def __init__(
        self,
        g: Callable[..., Any],
        *,
        estimator: ExactLogDet | PowerSeriesLogDet = ExactLogDet(),
        solver: Solver | str = "anderson",
        backward: Backward | str = "implicit",
        rtol: Any = 1e-6,
        atol: Any = 1e-6,
        max_steps: int = 100,
        batch_dims: int = 1,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__()
        if not callable(g):
            raise TypeError(f"InvertibleResidual(g) must be given a callable, got {g!r}.")
        check_options(max_steps, on_failure)
        get_stopping(rtol, atol, None)  # raises for what is unfit
        self.g = g
        self.estimator = _check_estimator(estimator)
        self.solver = get_solver(solver)
        self.backward = get_backward(backward)
        self.backward.check(self.solver)
        self.rtol = rtol
        self.atol = atol
        self.max_steps = max_steps
        self.batch_dims = batch_dims
        self.on_failure = on_failure

    def forward(
        self, x: Tensor, *inputs: Any, return_log_det: bool = False, generator: torch.Generator | None = None
    ) -> Any:
        """``x + g(x, *inputs)``.

        Args:
            x: (batch, event).
            *inputs: Handed to ``g`` after x.
            return_log_det: Return ``(y, log_det)``, of one call of g.
            generator: Source of the random numbers of the log-determinant; by default PyTorch's own.

        Returns:
            y, like x, or the pair.
        """
        if return_log_det:
            return self._with_log_det(x, inputs, self.estimator, generator)
        layout = self._layout(x)
        with constant_weights():
            return x + _checked(self.g, layout, x, inputs)

    def log_det(
        self,
        x: Tensor,
        *inputs: Any,
        estimator: ExactLogDet | PowerSeriesLogDet | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``log|det dy/dx|`` of each sample at x; that of the inverse at y is ``-log_det(inverse(y))``.

        Args:
            x: (batch, event).
            *inputs: Handed to ``g`` after x.
            estimator: Another one than the block's, say an exact one for evaluation.
            generator: Source of random numbers; by default PyTorch's own.

        Returns:
            (batch), in the dtype of x, at least float32.
        """
        estimator = self.estimator if estimator is None else _check_estimator(estimator)
        log_det: Tensor = self._with_log_det(x, inputs, estimator, generator)[1]
        return log_det

    def inverse(self, y: Tensor, *inputs: Any, return_solution: bool = False) -> Any:
        """The x with ``x + g(x, *inputs) = y``, differentiable in y, the inputs and all that g depends on.

        Args:
            y: (batch, event).
            *inputs: Handed to ``g`` after x.
            return_solution: Return ``(x, solution)``: ``solution.status`` and ``solution.residual`` of each sample tell
                how the solve went.

        Returns:
            x, like y, or the pair.

        Raises:
            ConvergenceError: A sample failed and ``on_failure="raise"``.
        """
        x, solution = fixed_point(
            _InverseMap(self.g, self._layout(y)),
            y,
            y,
            *inputs,
            solver=self.solver,
            backward=self.backward,
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
            batch_dims=self.batch_dims,
            on_failure=self.on_failure,
            return_solution=True,
        )
        return (x, solution) if return_solution else x

    def extra_repr(self) -> str:
        names = ("estimator", "solver", "backward", "rtol", "atol", "max_steps")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _layout(self, x: Any) -> Layout:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"InvertibleResidual takes one tensor, (batch, event), got a {type(x).__name__}. Concatenate the parts "
                "of a state; what g only reads comes after it, block(x, context)."
            )
        return Layout(x, self.batch_dims)

    def _with_log_det(
        self,
        x: Tensor,
        inputs: tuple[Any, ...],
        estimator: ExactLogDet | PowerSeriesLogDet,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        layout = self._layout(x)

        def flat_g(flat: Tensor) -> Tensor:
            return layout.pack(_checked(self.g, layout, layout.unpack(flat), inputs))

        with constant_weights():
            if torch.compiler.is_compiling():
                flat_g(layout.pack(x))  # computes the parametrized weights, which torch.func does not while compiling
            gx, *per_sample = estimator.run(flat_g, layout.pack(x), generator)
        log_det, sound = (layout.unpack_batch(part) for part in per_sample)
        if not (self.on_failure == "ignore" or torch.compiler.is_compiling() or transform_active()):
            self._report_unsound(log_det, sound)
        return x + layout.unpack(gx), log_det

    def _report_unsound(self, log_det: Tensor, sound: Tensor) -> None:
        if bool(sound.all()):
            return
        message = (
            "The log-determinant shows that g does not contract at some samples, or is not finite there. x + g(x) need "
            "not be invertible, and a power series for the log-determinant diverges. Bound the Lipschitz constant of g "
            "below 1, for instance with implicit.spectral_norm."
        )
        if self.on_failure == "warn":
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
            return
        status = torch.where(sound, Status.UNTESTED, Status.DIVERGED).to(torch.int8)
        steps = torch.ones_like(status, dtype=torch.int64)
        raise ConvergenceError(message, Solution(log_det, status, residual=None, num_steps=steps, num_evals=1))


class _InverseMap(nn.Module):
    """``x -> y - g(x)``, whose fixed point is the inverse at y."""

    def __init__(self, g: Callable[..., Any], layout: Layout) -> None:
        super().__init__()
        self.g = g
        self.layout = layout
        if not isinstance(g, nn.Module):
            # The modules that a function runs: their weights are looked for among our children.
            self.used = nn.ModuleList(dict.fromkeys(modules_used_by(g)))

    def forward(self, x: Tensor, y: Tensor, *inputs: Any) -> Tensor:
        return y - _checked(self.g, self.layout, x, inputs)


def _checked(g: Callable[..., Any], layout: Layout, x: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """``g(x, *inputs)``, which must have the shape of x: a sum would broadcast another one."""
    gx: Tensor = g(x, *inputs)
    layout.check(gx, "g")
    return gx


def _check_estimator(estimator: object) -> ExactLogDet | PowerSeriesLogDet:
    if isinstance(estimator, (ExactLogDet, PowerSeriesLogDet)):
        return estimator
    raise TypeError(f"estimator must be ExactLogDet() or PowerSeriesLogDet(...), got {estimator!r}.")

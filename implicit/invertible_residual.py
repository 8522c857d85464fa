"""Invertible residual blocks ``x + g(x)``, their inverses and their log-determinants."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from implicit.autograd.constant_weights import constant_weights
from implicit.autograd.modules_used import modules_used_by
from implicit.autograd.torch_internals import transform_active
from implicit.backward import Backward
from implicit.implicit_layer import ImplicitLayer
from implicit.log_determinant import ExactLogDet, PowerSeriesLogDet, check_estimator
from solvers import (
    NOT_GIVEN,
    NotGiven,
    Solution,
    Solver,
    Status,
    Stopping,
    StopRule,
    Tolerance,
    report_failure,
    stop_rule,
)
from solvers.problem import InDims, Layout, OnFailure, check_not_written, require_callable, version_of


class InvertibleResidual(ImplicitLayer):
    """A residual block ``y = x + g(x)`` that is invertible because g is a contraction.

    Use it to build normalizing flows. If ``Lip(g) < 1``, the inverse is the unique fixed point of ``x = y - g(x)``, and
    ``log det dy/dx = log det(I + dg/dx)`` is finite. Keeping ``Lip(g)`` below 1 is up to you: bound the linear layers
    with :func:`implicit.spectral_norm`, and multiply these bounds by the largest slopes of the activations
    (:func:`implicit.lipschitz_bound` does). If g is not a contraction, there need not be an inverse. A solve that does
    not converge is reported according to ``on_failure``, and so is a log-determinant that reveals that g does not
    contract.

    In training mode, spectral normalization advances its power iteration whenever the weights are computed, which is
    once per call of the block, of ``log_det`` and of ``inverse``. Until it has settled, two calls therefore use
    slightly different maps. In eval mode, and within ``torch.nn.utils.parametrize.cached()``, they use the same map.

    Under autocast, g runs in the lower precision, and the inverse is that of this rounded map. Sums, the solver's
    algebra and log-determinants are computed in float32 or float64.

    Args:
        g: The map, a module or any callable, called with x and the further inputs of the block. It must not mix
            samples, and its output must have the shape of x.
        estimator: How the log-determinant is computed: :class:`ExactLogDet` or :class:`PowerSeriesLogDet`.
        solver: The solver for the inverse, such as ``Anderson(memory=10)``, or its name.
        backward: The backward mode for the inverse, or its name.
        stopping: When the solve for the inverse stops, as in :func:`solvers.solve`. The next four options are a
            shorthand for it.
        rtol: Relative tolerance, 1e-6 if it is not given. The error of x can exceed the residual by a factor of
            1 / (1 - Lip(g)); ``solution.error_bound`` bounds it. ``rtol=None, atol=None`` takes exactly ``max_steps``
            steps.
        atol: Absolute tolerance on the root mean square over the entries of a sample.
        max_steps: The largest number of solver steps, 100 if it is not given.
        check_every: Test for convergence at every so many steps.
        batch_dims: The number of leading dimensions of x that index samples. The other dimensions form the event,
            which may have any shape.
        compact: Take finished samples out of the call of g, as in :class:`implicit.FixedPointLayer`.
        in_dims: With ``compact``, which dimension of x and of each further input indexes the samples.
        on_failure: "warn", "raise" or "ignore".

    Raises:
        TypeError, ValueError: An option is invalid.

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
        stopping: StopRule | None = None,
        rtol: Tolerance = NOT_GIVEN,
        atol: Tolerance = NOT_GIVEN,
        max_steps: int | NotGiven = NOT_GIVEN,
        check_every: int | NotGiven = NOT_GIVEN,
        batch_dims: int = 1,
        compact: bool = False,
        in_dims: InDims = 0,
        on_failure: OnFailure = "warn",
    ) -> None:
        require_callable("InvertibleResidual(g)", g)
        default = Stopping(rtol=1e-6, max_steps=100)
        super().__init__(
            solver=solver,
            backward=backward,
            stopping=stop_rule(
                stopping, rtol=rtol, atol=atol, max_steps=max_steps, check_every=check_every, default=default
            ),
            batch_dims=batch_dims,
            compact=compact,
            in_dims=in_dims,
            on_failure=on_failure,
        )
        self.g = g
        self.estimator = check_estimator(estimator)

    def forward(
        self, x: Tensor, *inputs: Any, return_log_det: bool = False, generator: torch.Generator | None = None
    ) -> Any:
        """Compute ``y = x + g(x, *inputs)``.

        Args:
            x: (batch, event).
            *inputs: Passed to ``g`` after x.
            return_log_det: Return ``(y, log_det)``, both from the same call of g.
            generator: Source of random numbers for the log-determinant; by default PyTorch's own generator.

        Returns:
            y, which is like x, or the pair.
        """
        if return_log_det:
            return self._with_log_det(x, inputs, self.estimator, generator)
        layout, version = self._layout(x), version_of(x)
        with constant_weights():
            gx = _checked(self.g, layout, x, inputs)
        check_not_written(x, version, "g changed its argument x in place, so x + g(x) is lost.")
        return x + gx

    def log_det(
        self,
        x: Tensor,
        *inputs: Any,
        estimator: ExactLogDet | PowerSeriesLogDet | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Compute ``log|det dy/dx|`` of each sample at x; that of the inverse at y is ``-log_det(inverse(y))``.

        Args:
            x: (batch, event).
            *inputs: Passed to ``g`` after x.
            estimator: An estimator to use instead of the block's, for instance an exact one for evaluation.
            generator: Source of random numbers; by default PyTorch's own generator.

        Returns:
            (batch), in the dtype of x, but at least float32.
        """
        estimator = self.estimator if estimator is None else check_estimator(estimator)
        log_det: Tensor = self._with_log_det(x, inputs, estimator, generator)[1]
        return log_det

    def inverse(self, y: Tensor, *inputs: Any, return_solution: bool = False) -> Any:
        """Compute the x with ``x + g(x, *inputs) = y``, differentiable in y, the inputs and all else g depends on.

        Args:
            y: (batch, event).
            *inputs: Passed to ``g`` after x.
            return_solution: Return ``(x, solution)``. The solution holds the status and the residual of each sample.

        Returns:
            x, which is like y, or the pair.

        Raises:
            ConvergenceError: A sample failed and ``on_failure="raise"``.
        """
        solution = self._solve(_InverseMap(self.g, self._layout(y)), y, (y, *inputs))
        return (solution.value, solution) if return_solution else solution.value

    def extra_repr(self) -> str:
        return f"estimator={self.estimator!r}, {super().extra_repr()}"

    def _layout(self, x: Any) -> Layout:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"InvertibleResidual takes one tensor, (batch, event), got a {type(x).__name__}. Concatenate the parts "
                "of a state into one tensor. Pass what g only reads as a further input: block(x, context)."
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
        if not (torch.compiler.is_compiling() or transform_active()):
            status = torch.where(sound, Status.UNTESTED, Status.DIVERGED).to(torch.int8)
            steps = torch.ones_like(status, dtype=torch.int64)
            report_failure(
                Solution(log_det, status, residual=None, num_steps=steps, num_evals=1),
                self.on_failure,
                "The log-determinant",
                failed="is not finite or shows that g does not contract",
                advice=lambda: (
                    "There x + g(x) need not be invertible, and the series for the log-determinant may diverge. Bound "
                    "the Lipschitz constant of g below 1, for instance with implicit.spectral_norm."
                ),
            )
        return x + layout.unpack(gx), log_det


class _InverseMap(nn.Module):
    """The map ``x -> y - g(x)``, whose fixed point is the inverse at y."""

    def __init__(self, g: Callable[..., Any], layout: Layout) -> None:
        super().__init__()
        self.g = g
        self.layout = layout
        if not isinstance(g, nn.Module):
            # The modules that a function refers to are registered as children, so that their parameters are found.
            self.used = nn.ModuleList(dict.fromkeys(modules_used_by(g)))

    def forward(self, x: Tensor, y: Tensor, *inputs: Any) -> Tensor:
        return y - _checked(self.g, self.layout, x, inputs)


def _checked(g: Callable[..., Any], layout: Layout, x: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """Return ``g(x, *inputs)`` after checking its shape, since a sum with x would broadcast another shape."""
    gx: Tensor = g(x, *inputs)
    layout.check(gx, "g")
    return gx

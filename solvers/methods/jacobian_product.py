"""Products of a map's Jacobian with vectors, by the first way that the map supports."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from solvers.methods.solver import FlatMapping
from solvers.problem.forward_mode import FORWARD_MODE
from solvers.problem.norms import rms_norm
from solvers.problem.small_systems import inverse_or_zero

# The ways to form a product, the best first.
Way = Literal["forward mode", "double backward", "finite differences"]


class JacobianProduct:
    """The product ``J v`` with J the Jacobian of ``f`` at ``z``, for (B, D) tensors whose rows are independent.

    Forward mode is exact and costs little more than a call of ``f``, but some operations and most custom autograd
    functions do not support it. Then the transpose of the product with the transpose is formed by differentiating
    twice, and where that is not supported either, a difference quotient. Errors that ``f`` itself raises are raised.

    Args:
        f: The map.
        z: (B, D) where its Jacobian is taken.
        fz: (B, D) the map at z.
        way: The best way that has not failed yet.

    Attributes:
        way: The way that worked last; for the next product of the same map.
    """

    way: Way

    def __init__(self, f: FlatMapping, z: Tensor, fz: Tensor, way: Way) -> None:
        self._f, self._z, self._fz = f, z, fz
        # The relative rounding error of f, which may be larger than that of the dtype.
        self._eps = float(getattr(f, "eps", torch.finfo(z.dtype).eps))
        self._pullback: Callable[[Tensor], Tensor] | None = None
        self.way = way

    def __call__(self, v: Tensor) -> Tensor:
        """(B, D) ``J v``."""
        if self.way == "forward mode":
            with contextlib.suppress(_DerivativeError):
                return self._derivative(self._forward_mode, v)
            self.way = "double backward"
            with contextlib.suppress(_DerivativeError):
                product = self._derivative(self._double_backward, v)
                # A function that is marked as differentiable once gives zeros here instead of an error.
                if self._agrees(product, v):
                    return product
            self.way, self._pullback = "finite differences", None
        if self.way == "double backward":
            return self._derivative(self._double_backward, v)
        return self._finite_difference(v)[0]

    def matrix(self) -> Tensor:
        """(B, D, D) J, column by column."""
        units = torch.eye(self._z.shape[1], dtype=self._z.dtype, device=self._z.device)
        # Forward mode refuses expanded tensors.
        columns = [self(unit.expand_as(self._z).contiguous()) for unit in units]
        return torch.stack(columns, dim=2) if columns else self._z.new_empty(len(self._z), 0, 0)

    def _derivative(self, product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """A product by automatic differentiation; a _DerivativeError where the map does not support it."""
        try:
            # Of a tensor without dimensions times a number PyTorch computes the derivative in float64.
            return product(v).to(v.dtype)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            # If it is the error of f itself, this raises it again.
            self._f(self._z)
            raise _DerivativeError from error

    def _forward_mode(self, v: Tensor) -> Tensor:
        # PyTorch 2.11's forward mode gives zeros under inference mode, without an error.
        with _without_inference_mode(), FORWARD_MODE:
            product: Tensor = torch.func.jvp(self._f, (_normal(self._z),), (_normal(v),))[1]
            return product

    def _double_backward(self, v: Tensor) -> Tensor:
        with _without_inference_mode():
            if self._pullback is None:
                pull = torch.func.vjp(self._f, _normal(self._z))[1]
                self._pullback = lambda u: pull(u)[0]
            # The pullback u -> J' u is linear: its own derivative's transpose is J, whatever u.
            transpose = torch.func.vjp(self._pullback, torch.zeros_like(_normal(self._fz)))[1]
            product: Tensor = transpose(_normal(v))[0]
            return product

    def _finite_difference(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) ``(f(z + h v) - f(z)) / h``, and (B,) the rounding errors in its root mean square."""
        eps = self._eps
        size = torch.maximum(rms_norm(self._z), rms_norm(self._fz))
        # The longest step that changes half of the digits.
        inverse = (rms_norm(v) * inverse_or_zero(eps**0.5 * size, 0.0)).unsqueeze(1)
        step = inverse_or_zero(inverse, 0.0)
        change = self._f(self._z + step * v) - self._fz
        return torch.where(inverse > 0, change * inverse, 0.0), eps * size * inverse.squeeze(1)

    def _agrees(self, product: Tensor, v: Tensor) -> bool:
        """Whether a product is near to a difference quotient, which has half of the digits at best.

        Asked of all samples where both are finite.
        """
        quotient, rounding = self._finite_difference(v)
        difference = rms_norm(product - quotient)
        bound = self._eps**0.25 * torch.maximum(rms_norm(product), rms_norm(quotient)) + 4 * rounding
        return not bool((difference > bound).any())


class _DerivativeError(Exception):
    """The map does not support the derivative that was asked for."""


@contextlib.contextmanager
def derivatives_allowed(z: Tensor) -> Iterator[Tensor]:
    """A context in which ``z``, or the copy of it that is given, can be differentiated also in inference mode."""
    with _without_inference_mode():
        yield _normal(z)


def _without_inference_mode() -> contextlib.AbstractContextManager[object]:
    if not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


def _normal(x: Tensor) -> Tensor:
    """The tensor itself, or a copy where it was made in inference mode and cannot be differentiated."""
    return x.clone() if x.is_inference() else x

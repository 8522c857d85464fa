"""A system of equations ``F(z) = 0`` as the fixed-point problem of ``z - c F(z)``."""

import torch
from torch import Tensor

from solvers.methods.jacobian_product import JacobianProduct
from solvers.problem import FlatMap, InDims, direction_of, inverse_or_zero, slope_inverse


class RootMap(FlatMap):
    """``z - c F(z)`` with one number c for each sample, chosen at the first call.

    c is the reciprocal of the slope of F along F itself, so that the map is of the size of the state, and does not
    depend on the units of F: with J = dF/dz and v = F(z) / |F(z)|, it is ``<v, J v> / |J v|^2``, whose sign and size
    make a plain step reduce |F| where a step along F can, and at least a tenth of ``1 / |J v|`` in size.

    Attributes:
        scaling: (B, 1) c; None before the first call.
    """

    called = "F"

    def residual(self, z: Tensor) -> Tensor:
        """(B, D) -> (B, D) ``F(z)``."""
        return super().__call__(z)

    def __call__(self, z: Tensor) -> Tensor:
        residual = self.residual(z)
        if self.scaling is None:
            with torch.no_grad():
                fz, at = residual.detach(), z.detach().contiguous()
                direction = direction_of(fz)
                product = JacobianProduct(self.residual, at, fz, "forward mode")(direction)
                self.set_scaling(at, fz, direction, product)
        assert self.scaling is not None
        return torch.addcmul(z, self.scaling, residual, value=-1)

    def image(self, z: Tensor) -> Tensor:
        assert self.scaling is not None
        return torch.addcmul(z, self.scaling, self._evaluated(z), value=-1)

    def set_scaling_by_matrix(self, z: Tensor, residual: Tensor, matrix: Tensor) -> None:
        """Choose c from the Jacobian (B, D, D) at ``z`` (B, D), where F is ``residual`` (B, D)."""
        if z.shape[1] == 1:
            self._set(matrix.squeeze(2).reciprocal(), z, residual)
            return
        direction = direction_of(residual)
        self.set_scaling(z, residual, direction, (matrix * direction.unsqueeze(1)).sum(dim=2))

    def set_scaling(self, z: Tensor, residual: Tensor, direction: Tensor, product: Tensor) -> None:
        """Choose c from the product of the Jacobian with ``direction``, a unit vector; all (B, D)."""
        self._set(slope_inverse(direction, product), z, residual)

    def _set(self, c: Tensor, z: Tensor, residual: Tensor) -> None:
        """Take c (B, 1), and something else where it is zero or not finite."""
        size, other = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (residual, z))
        # Without a slope, the units of the start; without these, none.
        default = other * inverse_or_zero(size, 0.0)
        default = torch.where((default > 0) & default.isfinite(), default, 1.0)
        self.scaling = torch.where(c.isfinite() & (c != 0), c, default)
        self.scaling_of_all = self.scaling.squeeze(1)

    @property
    def unit(self) -> Tensor | None:
        """(B,) |c|: the size of a state for a residual of size 1."""
        return None if self.scaling is None else self.scaling.abs().squeeze(1)

    def take_samples(self, keep: Tensor | range, in_dims: InDims) -> None:
        super().take_samples(keep, in_dims)
        if self.scaling is not None:
            self.scaling = self.scaling[keep.start : keep.stop] if isinstance(keep, range) else self.scaling[keep]

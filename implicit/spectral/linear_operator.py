"""The linear operator of a linear or convolutional layer: its products and an upper bound of its norm."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The factor by which the bound of a convolution may exceed the maximum over its grid of frequencies.
_GRID_EXCESS = 1.02

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclasses.dataclass(frozen=True)
class LinearOperator:
    """The linear map from a layer's input to its output without the bias: a matrix product or a convolution.

    A matrix product is the case without spatial dimensions. The arguments mean the same as those of ``nn.Conv2d``.

    Args:
        kernel_size: Number of taps in each spatial dimension.
        stride: Step between outputs in each spatial dimension.
        dilation: Distance between taps in each spatial dimension.
        padding: Number of entries added before and after the input in each spatial dimension.
        padding_mode: What the added entries hold.
        groups: Number of blocks of channels that do not mix.
    """

    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    padding_mode: str = "zeros"
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Module) -> "LinearOperator":
        """Return the operator of a layer."""
        if isinstance(layer, nn.Linear):
            return cls()
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise TypeError(
                f"Spectral norms are those of an nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d, got a "
                f"{type(layer).__name__}. Normalize the layers of these types inside it."
            )
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        match layer.padding:
            case "same":
                padding = tuple((r // 2, r - r // 2) for r in reach)
            case "valid":
                padding = tuple((0, 0) for _ in reach)
            case sides:
                padding = tuple((int(p), int(p)) for p in sides)
        return cls(layer.kernel_size, layer.stride, layer.dilation, padding, layer.padding_mode, layer.groups)

    def __call__(self, weight: Tensor, x: Tensor) -> Tensor:
        """Apply the operator to ``x``: (channels, *size) -> (out channels, *out size)."""
        if not self.kernel_size:
            return torch.mv(weight, x)
        if any(map(any, self.padding)):
            sides = [side for pair in reversed(self.padding) for side in pair]
            x = F.pad(x, sides, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        convolve = _CONVOLVE[len(self.kernel_size)]
        return convolve(x, weight, stride=self.stride, dilation=self.dilation, groups=self.groups)

    def adjoint(self, weight: Tensor, y: Tensor, like: Tensor) -> Tensor:
        """Apply the transposed operator to ``y``: (out channels, *out size) -> the shape of ``like``."""
        if not self.kernel_size:
            return torch.mv(weight.t(), y)
        pullback: Any = torch.func.vjp(lambda x: self(weight, x), torch.zeros_like(like))[1]
        result: Tensor = pullback(y)[0]
        return result

    def check_bound(self) -> None:
        """Raise a ValueError if :meth:`bound` is not proven for this operator."""
        if self.padding_mode not in ("zeros", "circular"):
            raise ValueError(
                f"There is no certified bound for a convolution with padding_mode={self.padding_mode!r}, which repeats "
                "a part of the input. Use padding_mode='zeros' or 'circular', or spectral_norm(method='power')."
            )
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if self.padding_mode == "circular" and any(sum(p) > r for p, r in zip(self.padding, reach, strict=True)):
            raise ValueError(
                f"There is no certified bound for a convolution with circular padding {self.padding} of a kernel that "
                f"reaches {tuple(reach)}: it repeats a part of the output. Use padding='same' or less padding."
            )

    def bound(self, weight: Tensor, largest: Callable[[Tensor], Tensor]) -> Tensor:
        """Return an upper bound of the operator's norm that holds for inputs of every size.

        On an infinite grid, a convolution of stride 1 with the kernel K multiplies by ``H(w) = sum_t K_t exp(-i w t)``
        in the Fourier domain. Its norm is therefore the largest singular value of H over all frequencies w. Padding
        with zeros restricts that operator to inputs that vanish outside, and to a part of the output; neither raises
        the norm. Circular padding restricts it to the frequencies ``2 pi j / n``, and leaves out a part of the output
        if it is smaller than the reach of the kernel. Dilation only maps the frequencies onto themselves.

        A stride s keeps every s-th output. With ``t = s q + r``, this is a convolution of stride 1 with the taps q of
        the s inputs ``x_r(n) = x(s n + r)``, which together hold the entries of x in another order: H has s times as
        many columns. (Under circular padding, s need not divide the period, so the bound is that of stride 1.) Groups
        are blocks of H.

        For unit vectors u and v, the real part of ``u' H(w) v`` is, up to a factor of modulus 1, a trigonometric
        polynomial of degree ``m = (taps - 1) / 2``. Next to a maximum it falls no faster than ``cos(m w)``. For N
        equidistant frequencies in each dimension, this gives

            norm <= max over the grid / prod cos(pi m / N).

        Args:
            weight: (out, in / groups, *kernel_size).
            largest: (..., rows, columns) -> (...), a bound of the largest singular values.

        Returns:
            A float64 scalar, which is differentiable.

        References:
            Ehlich and Zeller, "Schwankung von Polynomen zwischen Gitterpunkten", Mathematische Zeitschrift 86 (1964),
            for the last step. Sedghi, Gupta and Long, "The singular values of convolutional layers", ICLR (2019), for
            circular padding.
        """
        wide = weight.double()
        matrices, excess = self._symbol(wide)
        # A generous bound on the rounding errors in the sums of H.
        slack: Tensor = 64 * self.taps * torch.finfo(torch.float64).eps * torch.linalg.vector_norm(wide)
        return (largest(matrices).flatten().amax(dim=0) + slack) * excess

    @property
    def taps(self) -> int:
        """Number of kernel entries for each pair of channels."""
        return math.prod(self.kernel_size)

    def _symbol(self, weight: Tensor) -> tuple[Tensor, float]:
        """Return H on a grid, (*frequencies, groups, rows, columns), and the ratio of the bound to the largest norm."""
        h = weight.unflatten(0, (self.groups, -1))  # (groups, rows, columns, *kernel_size)
        excess = 1.0
        dims = len(self.kernel_size)
        for dim in range(dims):
            strided = self.stride[dim] > 1 and self.padding_mode == "zeros"
            stride, dilation = (self.stride[dim], self.dilation[dim]) if strided else (1, 1)
            position = dilation * torch.arange(self.kernel_size[dim], device=weight.device)
            reach = dilation * (self.kernel_size[dim] - 1) // stride
            points = max(1, math.ceil(math.pi * reach / 2 / math.acos(_GRID_EXCESS ** (-1 / dims))))
            excess /= math.cos(math.pi * reach / 2 / points)
            # H at the other frequencies is the complex conjugate, which has the same singular values.
            frequencies = points // 2 + 1 if dim == dims - 1 else points
            turns = torch.arange(frequencies, device=weight.device)[:, None] * (position // stride) % points
            angle = -2 * math.pi / points * turns.double()  # (frequencies, taps)
            phase = torch.polar(torch.ones_like(angle), angle)
            of_residue = position % stride == torch.arange(stride, device=weight.device)[:, None]  # (stride, taps)
            # Contracts the first remaining dimension of the kernel and appends those of frequencies and residues.
            h = torch.tensordot(h.to(phase.dtype), phase[:, None] * of_residue, dims=([3], [2]))
        h = h.permute(*range(3, h.dim(), 2), 0, 1, 2, *range(4, h.dim(), 2))
        return h.flatten(-1 - dims), excess

"""Soft spectral normalization of linear layers."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize

from solvers._autocast import without_autocast

# Power iterations from a random start. A start is settled once, so its cost does not matter; the iterations in
# training start where the last ones ended.
_SETTLING_ITERATIONS = 100


class SpectralNorm(nn.Module):
    """The parametrization behind :func:`spectral_norm`: ``weight / max(1, sigma / coeff)``.

    In training mode each computation of the weight first advances the power iteration by ``n_power_iterations``; in
    eval mode the singular vectors stay. The gradient takes the singular vectors as constants, which is the gradient of
    sigma. All is computed in float32 at least, also under autocast.

    Args:
        weight: (out, in) the weight at the start, for its shape, device and singular vectors.
        coeff: The largest spectral norm that is left alone.
        n_power_iterations: Power iterations a computation in training mode.

    Attributes:
        u: (out,) left singular vector.
        v: (in,) right singular vector.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, *, coeff: float = 0.9, n_power_iterations: int = 8) -> None:
        super().__init__()
        if weight.dim() != 2:
            raise ValueError(f"spectral_norm takes matrices, got a weight of shape {tuple(weight.shape)}.")
        if not coeff > 0:
            raise ValueError(f"spectral_norm(coeff=...) must be > 0, got {coeff!r}.")
        if not isinstance(n_power_iterations, int) or n_power_iterations < 1:
            raise ValueError(f"spectral_norm(n_power_iterations=...) must be an int >= 1, got {n_power_iterations!r}.")
        self.coeff = coeff
        self.n_power_iterations = n_power_iterations
        self.register_buffer("u", weight.new_empty(weight.shape[0]))
        self.register_buffer("v", weight.new_empty(weight.shape[1]))
        self.settle(weight)

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Compute the singular vectors of ``weight`` from a random start."""
        if weight.is_meta:
            return
        self.u.normal_()
        self._advance(weight, _SETTLING_ITERATIONS)

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in) -> the same, with a spectral norm of at most ``coeff`` up to the error of the power iteration."""
        if self.training:
            u, v = self._advance(weight.detach(), self.n_power_iterations)
        else:
            # The buffers may change before the backward pass of this computation.
            u, v = self.u.clone(), self.v.clone()
        return weight / (self._sigma(weight, u, v) / self.coeff).clamp_min(1.0).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What to store so that the weight becomes this one: itself, normalized only if it must be."""
        self.settle(weight)
        return weight

    @torch.no_grad()
    def sigma(self, weight: Tensor) -> Tensor:
        """The spectral norm of the unnormalized ``weight``, as the singular vectors have it."""
        return self._sigma(weight, self.u, self.v)

    @staticmethod
    def _sigma(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        with without_autocast(weight.device.type):
            weight, u, v = _at_least_float32(weight), _at_least_float32(u), _at_least_float32(v)
            return torch.dot(u, torch.mv(weight, v))

    @torch.no_grad()
    def _advance(self, weight: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        with without_autocast(weight.device.type):
            weight, u = _at_least_float32(weight), _at_least_float32(self.u)
            for _ in range(iterations):
                # The length of v cancels in u, so that one normalization a round is enough.
                v = torch.mv(weight.t(), u)
                u = normalize(torch.mv(weight, v), dim=0)
            v = normalize(v, dim=0)
        self.u.copy_(u)
        self.v.copy_(v)
        return u, v

    def extra_repr(self) -> str:
        return f"coeff={self.coeff}, n_power_iterations={self.n_power_iterations}"


def spectral_norm(
    module: nn.Linear, *, coeff: float = 0.9, n_power_iterations: int = 8, name: str = "weight"
) -> nn.Linear:
    """Bound the spectral norm of a linear layer's weight: W is used as ``W / max(1, sigma(W) / coeff)``.

    Soft: a weight whose norm is below ``coeff`` is used as it is. A map built from such layers and 1-Lipschitz
    activations contracts with factor ``coeff`` a layer, so that its fixed point exists and Picard iteration finds it.
    sigma comes from power iteration, which approaches it from below: it is settled at construction, when a weight is
    assigned, and tracked during training. Inside a :class:`implicit.FixedPointLayer` the weight is computed once a
    forward pass and constant during the solve.

    Initialize or change the weight by assigning it, ``layer.weight = w``, or through
    ``layer.parametrizations.weight.original``; ``torch.nn.init`` on ``layer.weight`` would write to a computed copy.

    Args:
        module: The layer. It is changed in place and returned.
        coeff: The largest spectral norm that is left alone.
        n_power_iterations: Power iterations a forward pass in training mode.
        name: The weight's name.

    Raises:
        TypeError: The module is no ``nn.Linear``.
        ValueError: An option is unfit, or the weight is normalized already.

    References:
        Behrmann, Grathwohl, Chen, Duvenaud and Jacobsen, "Invertible residual networks", ICML (2019), section 2.1.
        Miyato, Kataoka, Koyama and Yoshida, "Spectral normalization for GANs", ICLR (2018), algorithm 1.

    Example:
        >>> import torch
        >>> from implicit import spectral_norm
        >>> layer = spectral_norm(torch.nn.Linear(64, 64), coeff=0.5)
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) < 0.51)
        True
    """
    if not isinstance(module, nn.Linear):
        raise TypeError(f"spectral_norm takes an nn.Linear, got a {type(module).__name__}.")
    if parametrize.is_parametrized(module, name) and any(
        isinstance(p, SpectralNorm) for p in cast(nn.ModuleDict, module.parametrizations)[name].children()
    ):
        raise ValueError(f"The {name} of this layer is spectrally normalized already.")
    norm = SpectralNorm(getattr(module, name).detach(), coeff=coeff, n_power_iterations=n_power_iterations)
    norm.train(module.training)
    parametrize.register_parametrization(module, name, norm)
    return module


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

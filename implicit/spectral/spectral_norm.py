"""Soft spectral normalization of linear and convolutional layers."""

from collections.abc import Sequence
from typing import Literal, TypeVar, cast, get_args

from torch import nn
from torch.nn.utils import parametrize

from implicit.spectral.certified_norm import CertifiedNorm
from implicit.spectral.linear_operator import LinearOperator
from implicit.spectral.power_iteration import PowerIteration
from implicit.spectral.soft_norm import SpectralNorm

Method = Literal["power", "gram", "exact"]
Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def spectral_norm(
    module: Layer,
    *,
    coeff: float = 0.9,
    n_power_iterations: int = 8,
    method: Method = "power",
    n_gram_iterations: int = 6,
    input_size: Sequence[int] | None = None,
    name: str = "weight",
) -> Layer:
    """Bound the spectral norm of a layer: its weight W is used as ``W / max(1, sigma(W) / coeff)``.

    Soft: a weight whose norm is below ``coeff`` is used as it is. A map built from such layers and 1-Lipschitz
    activations contracts with factor ``coeff`` a layer, so that its fixed point exists and Picard iteration finds it.
    Inside a :class:`implicit.FixedPointLayer` the weight is computed once a forward pass and constant during the solve.

    The methods differ in how they find sigma, the norm of the layer as a linear map between Euclidean spaces:

    - ``"power"``: power iteration, the cheapest, which approaches sigma from below. It is settled at construction,
      when a weight is assigned, and tracked during training, by buffers.
    - ``"gram"``: Gram iteration, an upper bound. Matrix products alone: for GPUs.
    - ``"exact"``: from the eigenvalues of W W', lifted by the rounding error. The tightest upper bound, and on CPUs
      faster than Gram iteration.

    With the last two ``coeff`` is certified: no normalized weight exceeds it, whatever its dtype. (What the layer's own
    product rounds, under autocast for instance, comes on top.) They work in float64, which MPS devices do not have.

    Of a convolution the operator is bounded, not the kernel as a matrix. ``"power"`` finds its norm for one size of
    inputs and every kind of padding; the bounds of ``"gram"`` and ``"exact"`` hold for every size, for padding with
    zeros and circular padding, and are up to 2% larger than what an infinitely large input has.

    Initialize or change the weight by assigning it, ``layer.weight = w``, or through
    ``layer.parametrizations.weight.original``; ``torch.nn.init`` on ``layer.weight`` would write to a computed copy.

    Args:
        module: An ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``. It is changed in place and returned.
        coeff: The largest spectral norm that is left alone.
        n_power_iterations: Of ``"power"``: iterations a forward pass in training mode.
        method: "power", "gram" or "exact".
        n_gram_iterations: Of ``"gram"``. After n of them the bound is at most ``rank^(1 / 2^(n+1))`` times sigma: 6 are
            off by 4.4% for an orthogonal matrix of size 256, by 0.05% for a random one.
        input_size: Of ``"power"`` for a convolution, and required there: the spatial size of the inputs.
        name: The weight's name.

    Raises:
        TypeError: The module is none of these.
        ValueError: An option is unfit, the weight is normalized already, or there is no proof of a bound.

    References:
        Behrmann, Grathwohl, Chen, Duvenaud and Jacobsen, "Invertible residual networks", ICML (2019), section 2.1.
        Miyato, Kataoka, Koyama and Yoshida, "Spectral normalization for GANs", ICLR (2018), algorithm 1.
        Delattre, Barthelemy, Araujo and Allauzen, "Efficient bound of Lipschitz constant for convolutional layers by
        Gram iteration", ICML (2023).

    Example:
        >>> import torch
        >>> from implicit import spectral_norm
        >>> layer = spectral_norm(torch.nn.Linear(64, 64), coeff=0.5, method="exact")
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 0.5)
        True
    """
    if method not in get_args(Method):
        raise ValueError(f"spectral_norm(method=...) must be 'power', 'gram' or 'exact', got {method!r}.")
    operator = LinearOperator.of(module)
    if parametrize.is_parametrized(module, name) and any(
        isinstance(p, SpectralNorm) for p in cast(nn.ModuleDict, module.parametrizations)[name].children()
    ):
        raise ValueError(f"The {name} of this layer is spectrally normalized already.")
    norm: SpectralNorm
    if method == "power":
        norm = PowerIteration(
            getattr(module, name).detach(),
            operator,
            coeff=coeff,
            n_power_iterations=n_power_iterations,
            input_size=input_size,
        )
    elif input_size is not None:
        raise ValueError(
            f"input_size={input_size!r} is for method='power': the bound of {method!r} holds for every size."
        )
    else:
        norm = CertifiedNorm(operator, coeff=coeff, n_gram_iterations=n_gram_iterations if method == "gram" else None)
    norm.train(module.training)
    parametrize.register_parametrization(module, name, norm)
    return module

"""Soft spectral normalization of linear and convolutional layers."""

from collections.abc import Sequence
from typing import Literal, TypeVar, cast, get_args

from torch import nn
from torch.nn.utils import parametrize

from implicit.spectral.certified_norm import CertifiedNorm
from implicit.spectral.linear_operator import LinearOperator
from implicit.spectral.parametrization import SpectralNorm
from implicit.spectral.power_iteration import PowerIteration

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
    """Bound the spectral norm of a layer: it uses ``W / max(1, sigma(W) / coeff)`` instead of its weight W.

    The normalization is soft: a weight whose norm sigma is below ``coeff`` is used as it is. Use it to make a map
    contract: a chain of such layers with activations of slope at most 1 has a Lipschitz constant of at most ``coeff``
    to the power of the number of layers. For ``coeff < 1`` its fixed point exists, and Picard iteration finds it.
    Inside a :class:`implicit.FixedPointLayer`, the weight is computed once per forward pass and stays constant during
    the solve.

    The methods differ in how they find sigma, the norm of the layer as a linear map between Euclidean spaces:

    - ``"power"``: power iteration is the cheapest method. It approaches sigma from below. Its buffers are settled at
      construction and when a weight is assigned, and follow the weight during training.
    - ``"gram"``: Gram iteration gives an upper bound. It needs only matrix products, which suits GPUs.
    - ``"exact"``: the eigenvalues of W W', raised by a bound on the rounding error, give the tightest upper bound. On
      CPUs it is faster than Gram iteration.

    The last two certify ``coeff``: no normalized weight exceeds it, whatever its dtype. (Rounding in the layer's own
    product, for instance under autocast, comes on top.) They work in float64, which MPS devices do not support.

    For a convolution, sigma is the norm of the operator, not of the kernel reshaped to a matrix. ``"power"`` finds it
    for one size of inputs and any padding. The bounds of ``"gram"`` and ``"exact"`` hold for inputs of every size, with
    zero or circular padding, and exceed the norm for infinitely large inputs by at most 2%.

    To initialize or change the weight, assign it (``layer.weight = w``) or change
    ``layer.parametrizations.weight.original``; ``torch.nn.init`` on ``layer.weight`` would write to a computed copy.

    Args:
        module: An ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``. It is changed in place and returned.
        coeff: Upper bound on the spectral norm; larger weights are rescaled to it.
        n_power_iterations: For ``"power"``: the number of iterations per forward pass in training mode.
        method: "power", "gram" or "exact".
        n_gram_iterations: For ``"gram"``: the number of iterations. After n of them the bound is at most
            ``rank^(1 / 2^(n+1))`` times sigma; 6 are off by 4.4% for an orthogonal matrix of size 256 and by 0.05% for
            a random one.
        input_size: For ``"power"`` with a convolution, where it is required: the spatial size of the inputs.
        name: The name of the weight.

    Raises:
        TypeError: The module is none of these layers.
        ValueError: An option is invalid, the weight is already normalized, or no bound is proven for this convolution.

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
        raise ValueError(
            f"The {name} of this {type(module).__name__} is spectrally normalized already. To use other options, first "
            f"call torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})."
        )
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
            f"input_size={input_size!r} is for method='power': the bound of {method!r} holds for every size. Leave "
            "input_size out."
        )
    else:
        norm = CertifiedNorm(operator, coeff=coeff, n_gram_iterations=n_gram_iterations if method == "gram" else None)
    norm.train(module.training)
    parametrize.register_parametrization(module, name, norm)
    return module

"""Soft spectral normalization of linear and convolutional layers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize

from implicit._linear_operator import LinearOperator
from implicit._singular_values import exact_bound, gram_bound
from solvers._autocast import without_autocast

Method = Literal["power", "gram", "exact"]
Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)

# Power iterations from a random start. A start is settled once, so its cost does not matter; the iterations in
# training start where the last ones ended.
_SETTLING_ITERATIONS = 100


class SpectralNorm(nn.Module, ABC):
    """The parametrization behind :func:`spectral_norm`: ``weight / max(1, sigma / coeff)``.

    Attributes:
        coeff: The largest spectral norm that is left alone.
    """

    def __init__(self, operator: LinearOperator, *, coeff: float) -> None:
        super().__init__()
        if not coeff > 0:
            raise ValueError(f"spectral_norm(coeff=...) must be > 0, got {coeff!r}.")
        self.operator = operator
        self.coeff = coeff

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """The normalized weight, of the same shape and dtype."""

    @abstractmethod
    def sigma(self, weight: Tensor) -> Tensor:
        """The spectral norm of the unnormalized ``weight`` as the method has it, without gradient."""

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What to store so that the weight becomes this one: itself, normalized only if it must be."""
        return weight


class PowerIteration(SpectralNorm):
    """Sigma by power iteration, from below, with singular vectors that follow the weight in training.

    In training mode each computation of the weight first advances the power iteration by ``n_power_iterations``; in
    eval mode the singular vectors stay. The gradient takes the singular vectors as constants, which is the gradient of
    sigma. All is computed in float32 at least, also under autocast.

    Args:
        weight: The weight at the start, for its shape, device and singular vectors.
        operator: What the layer does with it.
        coeff: The largest spectral norm that is left alone.
        n_power_iterations: Power iterations a computation in training mode.
        input_size: Of a convolution, the spatial size of the inputs.

    Attributes:
        u: (out,) left singular vector; (out channels, *output size) for a convolution.
        v: (in,) right singular vector; (in channels, *input_size).
    """

    u: Tensor
    v: Tensor

    def __init__(
        self,
        weight: Tensor,
        operator: LinearOperator,
        *,
        coeff: float,
        n_power_iterations: int,
        input_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__(operator, coeff=coeff)
        _check_positive("n_power_iterations", n_power_iterations)
        dims = len(operator.kernel_size)
        if len(input_size or ()) != dims:
            raise ValueError(
                f"The norm of this layer with {dims} spatial dimensions depends on the size of its inputs for "
                f"method='power', got input_size={input_size!r}. Give input_size, a sequence of {dims} integers, or "
                "choose method='gram' or 'exact', whose bound holds for every size."
                if dims
                else f"input_size is for convolutions alone, got {input_size!r} with an nn.Linear."
            )
        self.n_power_iterations = n_power_iterations
        v = weight.new_empty(weight.shape[1] * operator.groups, *(input_size or ()))
        self.register_buffer("u", torch.empty_like(operator(weight, v)))
        self.register_buffer("v", v)
        self.settle(weight)

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Compute the singular vectors of ``weight`` from a random start."""
        if weight.is_meta:
            return
        self.u.normal_()
        self._advance(weight, _SETTLING_ITERATIONS)

    def forward(self, weight: Tensor) -> Tensor:
        """The same shape, with a spectral norm of at most ``coeff`` up to the error of the power iteration."""
        if self.training:
            u, v = self._advance(weight.detach(), self.n_power_iterations)
        else:
            # The buffers may change before the backward pass of this computation.
            u, v = self.u.clone(), self.v.clone()
        return weight / (self._sigma(weight, u, v) / self.coeff).clamp_min(1.0).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself; the singular vectors become its own."""
        self.settle(weight)
        return weight

    @torch.no_grad()
    def sigma(self, weight: Tensor) -> Tensor:
        """The spectral norm of the unnormalized ``weight``, as the singular vectors have it."""
        return self._sigma(weight, self.u, self.v)

    def _sigma(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        with without_autocast(weight.device.type):
            weight, u, v = _at_least_float32(weight), _at_least_float32(u), _at_least_float32(v)
            return torch.dot(u.flatten(), self.operator(weight, v).flatten())

    @torch.no_grad()
    def _advance(self, weight: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        with without_autocast(weight.device.type):
            weight, u, v = _at_least_float32(weight), _at_least_float32(self.u), _at_least_float32(self.v)
            for _ in range(iterations):
                # The length of v cancels in u, so that one normalization a round is enough.
                v = self.operator.adjoint(weight, u, like=v)
                u = _unit(self.operator(weight, v))
            v = _unit(v)
        self.u.copy_(u)
        self.v.copy_(v)
        return u, v

    def extra_repr(self) -> str:
        return f"coeff={self.coeff}, n_power_iterations={self.n_power_iterations}"


class CertifiedNorm(SpectralNorm):
    """Sigma by an upper bound, so that the normalized weight has a spectral norm of at most ``coeff``.

    The bound is computed in float64 at each computation of the weight, in training and in eval mode; it depends on the
    weight alone and needs no buffers. The weight is scaled such that rounding it to its dtype does not lift the norm
    above ``coeff`` again (barring underflow).

    Args:
        operator: What the layer does with the weight.
        coeff: The largest spectral norm that is left alone.
        n_gram_iterations: Iterations of Gram iteration, or None for the exact norm.
    """

    def __init__(self, operator: LinearOperator, *, coeff: float, n_gram_iterations: int | None) -> None:
        super().__init__(operator, coeff=coeff)
        if n_gram_iterations is not None:
            _check_positive("n_gram_iterations", n_gram_iterations)
        operator.check_bound()
        self.n_gram_iterations = n_gram_iterations
        self.register_load_state_dict_pre_hook(_drop_singular_vectors)  # type: ignore[no-untyped-call]

    def forward(self, weight: Tensor) -> Tensor:
        """The same shape and dtype, with a spectral norm of at most ``coeff``."""
        wide = weight.double()
        # Rounding changes each entry by half an eps, and the norm by no more than the sum of the taps' Frobenius norms.
        rounding = 0.51 * torch.finfo(weight.dtype).eps * self.operator.taps**0.5
        sigma = self._bound(weight) + rounding * torch.linalg.vector_norm(wide)
        normalized: Tensor = wide / (sigma / self.coeff).clamp_min(1.0)
        return normalized.to(weight.dtype)

    @torch.no_grad()
    def sigma(self, weight: Tensor) -> Tensor:
        """The upper bound of the spectral norm of the unnormalized ``weight``."""
        return self._bound(weight)

    def _bound(self, weight: Tensor) -> Tensor:
        iterations = self.n_gram_iterations
        if iterations is None:
            return self.operator.bound(weight, exact_bound)
        return self.operator.bound(weight, lambda matrices: gram_bound(matrices, iterations))

    def extra_repr(self) -> str:
        method = "exact" if self.n_gram_iterations is None else f"n_gram_iterations={self.n_gram_iterations}"
        return f"coeff={self.coeff}, {method}"


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


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"spectral_norm({name}=...) must be an int >= 1, got {value!r}.")


def _drop_singular_vectors(_module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """So that a checkpoint of method "power" loads."""
    for name in ("u", "v"):
        state_dict.pop(prefix + name, None)


def _unit(x: Tensor) -> Tensor:
    return normalize(x.flatten(), dim=0).view_as(x)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

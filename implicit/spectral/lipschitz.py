"""Certified Lipschitz constants of modules."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from implicit.spectral.linear_operator import LinearOperator
from implicit.spectral.singular_values import exact_bound

# A module's Lipschitz constant, or how to find it.
Constant = float | Callable[[Any], float | Tensor]


def lipschitz_bound(module: nn.Module, *, known: Mapping[type[nn.Module], Constant] = MappingProxyType({})) -> Tensor:
    """An upper bound of a module's Lipschitz constant between Euclidean spaces, composed from those of its layers.

        |module(x) - module(y)| <= bound |x - y|   for all x and y

    for the norm over all entries of one sample. ``nn.Sequential`` multiplies what its layers have: linear layers and
    convolutions the exact norm of the operator, which rounding does not break (for convolutions as in
    :func:`implicit.spectral_norm`, for inputs of every size), activations their own largest slope, batch
    normalization in eval mode its largest factor. The bound holds for the weights as they are now, and is
    differentiable in them. A product of norms is often far above the true constant; a map for which it is below 1
    surely contracts.

    A module of another type is refused, by name. Its constant can be given: by type, a number or a function of the
    module, which is how residual and parallel branches are composed::

        lipschitz_bound(net, known={Residual: lambda m: 1 + lipschitz_bound(m.branch)})

    Subclasses that keep the ``forward`` of a known type count as that type. What forward hooks change is not seen.

    Args:
        module: The module.
        known: Constants of further types, or in the place of those built in; subclasses included.

    Returns:
        A float64 scalar.

    Raises:
        TypeError: A module of an unknown type.
        ValueError: There is no bound for a module's options or mode.

    Example:
        >>> import torch
        >>> from implicit import lipschitz_bound, spectral_norm
        >>> layer = spectral_norm(torch.nn.Linear(64, 64), coeff=0.8, method="exact")
        >>> bool(lipschitz_bound(torch.nn.Sequential(layer, torch.nn.GELU())) <= 0.8 * 1.12905)
        True
    """
    return _bound(module, known, name="")


def _bound(module: nn.Module, known: Mapping[type[nn.Module], Constant], name: str) -> Tensor:
    constant = _find(module, known)
    if constant is None and isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        bounds = [_bound(child, known, f"{name}.{key}".lstrip(".")) for key, child in module.named_children()]
        return math.prod(bounds, start=torch.ones((), dtype=torch.float64))
    if constant is None:
        where = f" {name!r}," if name else ""
        raise TypeError(
            f"lipschitz_bound does not know the module{where} a {type(module).__name__}. Give its constant, or a "
            f"function of it: known={{{type(module).__name__}: ...}}."
        )
    return torch.as_tensor(constant(module) if callable(constant) else constant, dtype=torch.float64)


def _find(module: nn.Module, known: Mapping[type[nn.Module], Constant]) -> Constant | None:
    for cls in type(module).__mro__:
        if cls in known:
            return known[cls]
        if cls in _CONSTANTS and type(module).forward is cls.forward:
            return _CONSTANTS[cls]
    return None


def _operator_norm(layer: Any) -> Tensor:
    operator = LinearOperator.of(layer)
    operator.check_bound()
    with _not_training(layer):  # a weight that is computed stays what it is
        return operator.bound(layer.weight, exact_bound)


@contextlib.contextmanager
def _not_training(module: nn.Module) -> Iterator[None]:
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


def _batch_norm(layer: Any) -> float | Tensor:
    if layer.training or layer.running_var is None:
        raise ValueError(
            f"{type(layer).__name__} with the statistics of the batch mixes samples and has no Lipschitz constant. "
            "Call eval() before lipschitz_bound, and keep running statistics."
        )
    scale = (layer.running_var.double() + layer.eps).rsqrt()
    factors: Tensor = scale if layer.weight is None else scale * layer.weight
    return factors.abs().max()


def _normalization(layer: nn.Module) -> float:
    raise ValueError(
        f"{type(layer).__name__} has no useful Lipschitz constant: near inputs without variance its slope is "
        "1 / sqrt(eps), and without eps unbounded. Leave it out of the map, or give a constant that holds for your "
        f"inputs: known={{{type(layer).__name__}: ...}}."
    )


def _dropout(layer: Any) -> float:
    # Of any one mask.
    return 1.0 if not layer.training else 1 / (1 - layer.p) if layer.p < 1 else 0.0


def _gelu(layer: Any) -> float:
    # At sqrt(2): (1 + erf(1)) / 2 + exp(-1) / sqrt(pi). The approximation has its largest slope at 1.41850.
    return 1.1289041451851549 if layer.approximate == "none" else 1.1289930686587719


def _celu(layer: Any) -> float:
    if layer.alpha < 0:
        raise ValueError(f"CELU with alpha={layer.alpha!r} < 0 grows exponentially: it has no Lipschitz constant.")
    return 1.0


# The largest slope of an activation, rounded up; of the others the norm as a map.
_CONSTANTS: dict[type[nn.Module], Constant] = {
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.CELU: _celu,
    nn.ChannelShuffle: 1.0,
    nn.Conv1d: _operator_norm,
    nn.Conv2d: _operator_norm,
    nn.Conv3d: _operator_norm,
    nn.Dropout: _dropout,
    nn.Dropout1d: _dropout,
    nn.Dropout2d: _dropout,
    nn.Dropout3d: _dropout,
    nn.ELU: lambda layer: max(1.0, abs(layer.alpha)),
    nn.Flatten: 1.0,
    nn.GELU: _gelu,
    nn.GroupNorm: _normalization,
    nn.Hardsigmoid: 0.16666666666666669,
    nn.Hardswish: 1.5,
    nn.Hardtanh: 1.0,
    nn.Identity: 1.0,
    nn.InstanceNorm1d: _normalization,
    nn.InstanceNorm2d: _normalization,
    nn.InstanceNorm3d: _normalization,
    nn.LayerNorm: _normalization,
    nn.LeakyReLU: lambda layer: max(1.0, abs(layer.negative_slope)),
    nn.Linear: _operator_norm,
    nn.LogSigmoid: 1.0,
    # At 1.49057.
    nn.Mish: 1.0884981612512580,
    nn.PReLU: lambda layer: layer.weight.double().abs().max().clamp_min(1.0),
    nn.PixelShuffle: 1.0,
    nn.PixelUnshuffle: 1.0,
    nn.RMSNorm: _normalization,
    nn.RReLU: lambda layer: max(1.0, abs(layer.lower), abs(layer.upper)),
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    # At 0 from below.
    nn.SELU: 1.7580993408473770,
    # At 2.39936.
    nn.SiLU: 1.0998393201288671,
    nn.Sigmoid: 0.25,
    # The Jacobian diag(p) - p p' has row sums of moduli 2 p (1 - p).
    nn.Softmax: 0.5,
    # Its switch to the identity lowers it by exp(-threshold), which is rounding.
    nn.Softplus: 1.0,
    nn.Softshrink: 1.0,
    nn.Softsign: 1.0,
    nn.Tanh: 1.0,
    nn.Tanhshrink: 1.0,
    nn.Unflatten: 1.0,
}

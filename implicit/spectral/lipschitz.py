"""Certified bounds of the Lipschitz constants of modules."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from implicit.spectral.linear_operator import LinearOperator
from implicit.spectral.singular_value_bounds import exact_bound

# A module's Lipschitz constant, or a function that computes it from the module.
Constant = float | Callable[[Any], float | Tensor]


def lipschitz_bound(module: nn.Module, *, known: Mapping[type[nn.Module], Constant] = MappingProxyType({})) -> Tensor:
    """Compute an upper bound of a module's Lipschitz constant from the bounds of its layers.

        |module(x) - module(y)| <= bound |x - y|   for all x and y,

    where ``|.|`` is the Euclidean norm over all entries of one sample. Use it to check that a map contracts: a bound
    below 1 proves it. A bound above 1 proves nothing, since a product of norms is often far above the true constant.

    The bound of an ``nn.Sequential`` is the product over its layers. A linear layer or convolution contributes the
    exact norm of its operator, rounded up (for a convolution the bound for inputs of every size, as in
    :func:`implicit.spectral_norm`), an activation its own largest slope, and batch normalization in eval mode its
    largest factor. The bound holds for the current weights and is differentiable in them.

    Modules of other types are refused with an error that names them. Give their constants in ``known``, as a number or
    as a function of the module; this is also how residual and parallel branches are composed::

        lipschitz_bound(net, known={Residual: lambda m: 1 + lipschitz_bound(m.branch)})

    A subclass that keeps the ``forward`` of a known type counts as that type. Changes made by forward hooks are not
    seen.

    Args:
        module: The module.
        known: Constants by type, for these types and their subclasses. They take precedence over the built-in ones.

    Returns:
        A float64 scalar.

    Raises:
        TypeError: The type of a module is unknown.
        ValueError: There is no bound for the options or the mode of a module.

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
        bounds = [_bound(child, known, f"{name}.{key}".lstrip(".")) for key, child in enumerate(module)]
        return math.prod(bounds, start=torch.ones((), dtype=torch.float64))
    if constant is None:
        where = f" {name!r}," if name else ""
        raise TypeError(
            f"lipschitz_bound does not know the module{where} a {type(module).__name__}. Give its constant, or a "
            f"function that computes it from the module: known={{{type(module).__name__}: ...}}."
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
    with _not_training(layer):  # in training mode, computing the weight would advance its power iteration
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
            "Call eval() before lipschitz_bound, and construct the layer with track_running_stats=True."
        )
    scale = (layer.running_var.double() + layer.eps).rsqrt()
    factors: Tensor = scale if layer.weight is None else scale * layer.weight
    return factors.abs().max()


def _normalization(layer: nn.Module) -> float:
    raise ValueError(
        f"{type(layer).__name__} has no useful Lipschitz constant: its slope reaches 1 / sqrt(eps) where the inputs "
        "have no variance. Remove it from the map, or give a constant that holds for your inputs: "
        f"known={{{type(layer).__name__}: ...}}."
    )


def _dropout(layer: Any) -> float:
    # The constant for any fixed mask.
    return 1.0 if not layer.training else 1 / (1 - layer.p) if layer.p < 1 else 0.0


def _gelu(layer: Any) -> float:
    # The largest slope is at sqrt(2): (1 + erf(1)) / 2 + exp(-1) / sqrt(pi). That of the approximation is at 1.41850.
    return 1.1289041451851549 if layer.approximate == "none" else 1.1289930686587719


def _celu(layer: Any) -> float:
    if layer.alpha < 0:
        raise ValueError(
            f"CELU with alpha={layer.alpha!r} < 0 grows exponentially: it has no Lipschitz constant. Use alpha > 0."
        )
    return 1.0


def _softplus(layer: Any) -> float:
    # Where it switches to the identity, at threshold / beta, its value drops by log(1 + exp(-threshold)) / beta.
    threshold = layer.threshold
    if threshold <= 0 or math.log1p(math.exp(-threshold)) > torch.finfo(torch.float32).eps * threshold:
        raise ValueError(
            f"Softplus with threshold={threshold!r} has no Lipschitz constant: where it switches to the identity, its "
            "value drops by more than the rounding error of float32. Use the default, threshold=20."
        )
    return 1.0


# Lipschitz constants by type. Those of activations are their largest slopes, rounded up.
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
    # The slope at 1.49057.
    nn.Mish: 1.0884981612512580,
    nn.PReLU: lambda layer: layer.weight.double().abs().max().clamp_min(1.0),
    nn.PixelShuffle: 1.0,
    nn.PixelUnshuffle: 1.0,
    nn.RMSNorm: _normalization,
    nn.RReLU: lambda layer: max(1.0, abs(layer.lower), abs(layer.upper)),
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    # The slope at 0 from below.
    nn.SELU: 1.7580993408473770,
    # The slope at 2.39936.
    nn.SiLU: 1.0998393201288671,
    nn.Sigmoid: 0.25,
    # In each row of the Jacobian diag(p) - p p', the absolute values add up to 2 p (1 - p).
    nn.Softmax: 0.5,
    nn.Softplus: _softplus,
    nn.Softshrink: 1.0,
    nn.Softsign: 1.0,
    nn.Tanh: 1.0,
    nn.Tanhshrink: 1.0,
    nn.Unflatten: 1.0,
}

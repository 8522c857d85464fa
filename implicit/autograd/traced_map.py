"""Maps in the form in which compiled solves see them: their parametrized weights are constants that are given."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList

from implicit.autograd.constant_weights import weights_in_force
from implicit.autograd.torch_internals import tracing_weights
from solvers.problem import Traceable, Traced


class MapInForce(Traceable):
    """``f`` with the parametrized weights that are in force around the solve.

    Args:
        f: The user's map.
    """

    def __init__(self, f: Callable[..., Any]) -> None:
        self._f = f

    def __call__(self, z: Any, *args: Any) -> Any:
        return self._f(z, *args)

    def traced(self) -> Callable[..., Any]:
        return with_weights(self._f, weights_in_force())


class MapWithWeights(Traced):
    """``f`` with these weights instead of those that its parametrizations compute.

    Args:
        f: The user's map.
        weights: The weights, by their parametrizations.
    """

    def __init__(self, f: Callable[..., Any], weights: Mapping[ParametrizationList, Tensor]) -> None:
        self.f = f
        self._parametrizations = list(weights)
        self._weights = [weight.detach() for weight in weights.values()]

    def __call__(self, z: Any, *args: Any) -> Any:
        return self.f(z, *args)

    def context(self) -> contextlib.AbstractContextManager[object]:
        return tracing_weights(list(zip(self._parametrizations, self._weights, strict=True)))


def with_weights(f: Callable[..., Any], weights: Mapping[ParametrizationList, Tensor]) -> Callable[..., Any]:
    """``f`` with these weights, if there are any."""
    return MapWithWeights(f, weights) if weights else f

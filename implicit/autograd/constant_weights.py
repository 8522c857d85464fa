"""Parametrized weights that are computed once for a whole solve.

A parametrization (spectral normalization, weight normalization, orthogonality ...) computes its weight at every
access: in every call of the map, and with power iteration each time to another value. A solve needs one constant map.
So inside :func:`constant_weights` each weight is computed at its first access, however the map reaches the module, and
read from then on. Only the running thread sees this; no module and no state of the process is changed.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from implicit.autograd.torch_internals import (
    WeightSource,
    computed_weight,
    in_cache,
    originals_of,
    outside_transforms_above,
    put_in_cache,
    transform_level,
    weight_source,
)

Result = TypeVar("Result")

Weights = dict[ParametrizationList, Tensor]


class ConstantWeights:
    """The weights of one solve, by their parametrizations.

    Inside another solve they are taken from that one, and those that are computed belong to it too, so that the outer
    map is constant as well. A weight is computed in the grad mode, and under the transforms, of the outermost
    solve's beginning: a solver that runs under ``no_grad`` leaves it its gradient.

    Args:
        given: Weights that are known already.

    Attributes:
        values: Those that are known.
        varying: The parametrizations whose weight is not constant: the map lends their modules different tensors.
    """

    def __init__(self, given: Mapping[ParametrizationList, Tensor] | None = None) -> None:
        self.values: Weights = dict(given or {})
        self._originals: dict[ParametrizationList, tuple[Tensor | None, ...]] = {}
        self.varying: set[ParametrizationList] = set()
        self._outer = weight_source.get()
        self._grad_enabled = torch.is_grad_enabled()
        self._level = transform_level()

    def weight_of(self, parametrization: ParametrizationList) -> Tensor:
        """The weight, computed at the first access."""
        if parametrization in self.varying:
            return computed_weight(parametrization)
        value = self.values.get(parametrization)
        if value is None:
            value = self.values[parametrization] = self._new(parametrization)
            self._originals[parametrization] = originals_of(parametrization)
            return value
        originals = self._originals.get(parametrization)
        if originals is not None and any(map(_is_not, originals, originals_of(parametrization))):
            # The map itself lends the module different tensors: these are different weights.
            self._set_varying(parametrization)
            return computed_weight(parametrization)
        return value

    def take(self) -> Weights:
        """The weights that are known, which are then known no more."""
        values, self.values, self._originals = self.values, {}, {}
        return values

    def _set_varying(self, parametrization: ParametrizationList) -> None:
        self.varying.add(parametrization)
        self.values.pop(parametrization, None)
        outer = self._outer.weights if isinstance(self._outer, _Detached) else self._outer
        if isinstance(outer, ConstantWeights):
            outer._set_varying(parametrization)

    def _new(self, parametrization: ParametrizationList) -> Tensor:
        if self._outer is not None:
            return self._outer.weight_of(parametrization)
        # Power iteration writes to buffers, which a transform that the map runs under would not allow.
        with outside_transforms_above(self._level), torch.set_grad_enabled(self._grad_enabled):
            return computed_weight(parametrization)

    @contextlib.contextmanager
    def in_force(self) -> Iterator["ConstantWeights"]:
        """Inside, parametrized weights are these."""
        with _reading_from(self), in_cache(self.values):
            yield self

    def calling_as_constants(self, function: Callable[[], Result]) -> Result:
        """``function()`` with these weights, but autograd does not see where they come from."""
        while True:
            varying = len(self.varying)
            constants = {parametrization: weight.detach() for parametrization, weight in self.values.items()}
            with _reading_from(_Detached(self)), in_cache(constants):
                result = function()
            put_in_cache(self.values)
            if len(self.varying) == varying:
                return result
            # A weight has turned out not to be constant, after it was used as one.


class _Detached:
    """Reads weights without their history. What is computed from other weights is computed with it."""

    def __init__(self, weights: ConstantWeights) -> None:
        self.weights = weights

    def weight_of(self, parametrization: ParametrizationList) -> Tensor:
        with _reading_from(self.weights):
            weight = self.weights.weight_of(parametrization)
        return weight if parametrization in self.weights.varying else weight.detach()


def constant_weights() -> contextlib.AbstractContextManager[object]:
    """Inside, every parametrized weight is computed once, at its first access in this thread."""
    if torch.compiler.is_compiling():
        # PyTorch's cache, which torch.compile and torch.export can trace. It belongs to the process.
        cached: contextlib.AbstractContextManager[object] = parametrize.cached()
        return cached
    return ConstantWeights().in_force()


def weights_in_force() -> Weights:
    """The weights that are known in the innermost solve of this thread."""
    source = weight_source.get()
    weights = source.weights if isinstance(source, _Detached) else source
    return dict(weights.values) if isinstance(weights, ConstantWeights) else {}


@contextlib.contextmanager
def _reading_from(source: WeightSource) -> Iterator[None]:
    token = weight_source.set(source)
    try:
        yield
    finally:
        weight_source.reset(token)


def _is_not(a: object, b: object) -> bool:
    return a is not b

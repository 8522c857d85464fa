"""Parametrized weights that are computed once for a whole solve.

A parametrization (spectral normalization, weight normalization, orthogonality ...) computes its weight at every
access: in every call of the map, and with power iteration each time to another value. A solve needs one constant map.
So inside :func:`constant_weights` each weight is computed at its first access, however the map reaches the module, and
read from then on. Only the running thread sees this; no module and no state of the process is changed.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from implicit.autograd.torch_internals import WeightSource, computed_weight, originals_of, weight_source

Weights = dict[ParametrizationList, Tensor]


class ConstantWeights:
    """The weights of one solve, by their parametrizations.

    Inside another solve they are taken from that one, and those that are computed belong to it too, so that the outer
    map is constant as well. A weight is computed in the grad mode of the outermost solve's beginning: a solver that
    runs under ``no_grad`` leaves it its gradient.

    Args:
        given: Weights that are known already.
    """

    def __init__(self, given: Mapping[ParametrizationList, Tensor] | None = None) -> None:
        self.values: Weights = dict(given or {})
        self._originals: dict[ParametrizationList, tuple[Tensor | None, ...]] = {}
        self._varying: set[ParametrizationList] = set()
        self._outer = weight_source.get()
        self._grad_enabled = torch.is_grad_enabled()

    def weight_of(self, parametrization: ParametrizationList) -> Tensor:
        """The weight, computed at the first access."""
        if parametrization in self._varying:
            return computed_weight(parametrization)
        value = self.values.get(parametrization)
        if value is None:
            value = self.values[parametrization] = self._new(parametrization)
            self._originals[parametrization] = originals_of(parametrization)
            return value
        originals = self._originals.get(parametrization)
        if originals is not None and any(map(_is_not, originals, originals_of(parametrization))):
            # The map itself lends the module different tensors: these are different weights.
            self._varying.add(parametrization)
            del self.values[parametrization]
            return computed_weight(parametrization)
        return value

    def _new(self, parametrization: ParametrizationList) -> Tensor:
        if self._outer is not None:
            return self._outer.weight_of(parametrization)
        with torch.set_grad_enabled(self._grad_enabled):
            return computed_weight(parametrization)

    @contextlib.contextmanager
    def in_force(self) -> Iterator["ConstantWeights"]:
        """Inside, parametrized weights are these."""
        with _reading_from(self):
            yield self

    @contextlib.contextmanager
    def in_force_as_constants(self) -> Iterator[None]:
        """The same, but autograd does not see where they come from."""
        with _reading_from(_Detached(self)):
            yield


class _Detached:
    """Reads weights without their history. What is computed from other weights is computed with it."""

    def __init__(self, weights: ConstantWeights) -> None:
        self._weights = weights

    def weight_of(self, parametrization: ParametrizationList) -> Tensor:
        with _reading_from(self._weights):
            return self._weights.weight_of(parametrization).detach()


def constant_weights() -> contextlib.AbstractContextManager[object]:
    """Inside, every parametrized weight is computed once, at its first access in this thread."""
    if torch.compiler.is_compiling():
        # PyTorch's cache, which torch.compile and torch.export can trace. It belongs to the process.
        cached: contextlib.AbstractContextManager[object] = parametrize.cached()
        return cached
    return ConstantWeights().in_force()


@contextlib.contextmanager
def _reading_from(source: WeightSource) -> Iterator[None]:
    token = weight_source.set(source)
    try:
        yield
    finally:
        weight_source.reset(token)


def _is_not(a: object, b: object) -> bool:
    return a is not b

"""The maps whose fixed points an iMLP takes.

A hierarchical Hopfield network with hidden layers h_1 ... h_H, of which neighbors are coupled by W_k upwards and by V_k
downwards, is at rest where

    h_1 = y + V_1 act(h_2),    h_k = W_{k-1} act(h_{k-1}) + V_k act(h_{k+1}),    h_H = W_{H-1} act(h_{H-1}).

:class:`ContractiveBlock` eliminates the layers from the top, with a solve for each of them. :class:`JointBlock` solves
for all of them together.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from implicit import FixedPointLayer


class Coupling(NamedTuple):
    """The weights and biases between a layer of n units and the one above it, of m units.

    Attributes:
        up: (m, n) W.
        up_bias: (m,) or None.
        down: (n, m) V.
        down_bias: (n,) or None.
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def from_below(self, x: Tensor) -> Tensor:
        """(rows, n) -> (rows, m)."""
        return F.linear(x, self.up, self.up_bias)

    def from_above(self, x: Tensor) -> Tensor:
        """(rows, m) -> (rows, n)."""
        return F.linear(x, self.down, self.down_bias)


class ContractiveBlock(nn.Module):
    """The map ``z -> y + F_1(z)`` of the lowest hidden layer, with the layers above it eliminated.

    ``F_k(x) = V_k act((1 - F_{k+1})^{-1} W_k act(x))``, and the highest is ``V act(W act(x))``. All tensors except the
    activation's own are arguments.

    Args:
        act: The activation.
        inner: The layer that solves ``h = u + F_{k+1}(h)`` for u; None in the highest block.
    """

    def __init__(self, act: nn.Module, inner: FixedPointLayer | None = None) -> None:
        super().__init__()
        self.act = act
        self.inner = inner

    def forward(self, z: Tensor, y: Tensor, coupling: Coupling, *above: Coupling) -> Tensor:
        """(rows, D) -> the same."""
        hidden = coupling.from_below(self.act(z))
        if self.inner is not None:
            hidden = self.inner(hidden, *above)
        return y + coupling.from_above(self.act(hidden))


class JointBlock(nn.Module):
    """The map of every second hidden layer, ``(h_1, h_3, ...)``, through those between them.

    A layer depends only on its neighbors, so that h_1, h_3, ... give h_2, h_4, ..., and these h_1, h_3, ... again.
    So half of the layers are enough as the state of one solve for all of them. One call gets as far as two calls of the
    map over all layers, and costs as much as one. With two layers it is the map of :class:`ContractiveBlock`.

    Args:
        act: The activation.
    """

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, state: tuple[Tensor, ...], y: Tensor, *couplings: Coupling) -> tuple[Tensor, ...]:
        """((rows, D), (rows, width), ...) -> the same."""
        highest = len(couplings)
        activated = {2 * i: self.act(layer) for i, layer in enumerate(state)}

        def layer(k: int) -> Tensor:
            below = y if k == 0 else couplings[k - 1].from_below(activated[k - 1])
            return below if k == highest else below + couplings[k].from_above(activated[k + 1])

        for k in range(1, highest + 1, 2):
            activated[k] = self.act(layer(k))
        return tuple(layer(k) for k in range(0, highest + 1, 2))

    def start(self, y: Tensor, *couplings: Coupling) -> tuple[Tensor, ...]:
        """Where the solve starts: the first step is then that of nested solves with one step each."""
        ups, downs = zip(*((coupling.from_below, coupling.from_above) for coupling in couplings), strict=True)
        return tuple(sweep(self.act, y, ups, downs, lowest=2)[::2])


def sweep(
    act: nn.Module,
    y: Tensor,
    ups: Sequence[Callable[[Tensor], Tensor]],
    downs: Sequence[Callable[[Tensor], Tensor]],
    *,
    lowest: int = 0,
) -> list[Tensor]:
    """The hidden layers after one pass upwards from y and one downwards to the layer ``lowest``, counted from 0."""
    layers = [y]
    for up in ups:
        layers.append(up(act(layers[-1])))
    for k in reversed(range(lowest, len(downs))):
        layers[k] = layers[k] + downs[k](act(layers[k + 1]))
    return layers

"""Classify the nodes of long chains by an implicit graph network (Gu et al. 2020), where layer-wise networks fail.

python examples/zoo/implicit_graph_network.py
    The paper's synthetic data: chains of nodes, each of one class, which only the first node's features tell. To
    classify a node, the network must carry that information along the chain. For several lengths, prints the accuracy
    on the test nodes of the implicit network and of a graph convolutional network of four layers and the same width,
    whose nodes see no further than four neighbors. About a minute on two cores.

The state X of all nodes is the equilibrium of

    X = relu(A X W + U),

where A is the adjacency matrix, with rows that sum to at most 1, and U comes from the features. After each step of
training, W is projected to the ball of matrices whose columns have an l1 norm of at most kappa < 1. Then the map
contracts by kappa in the largest entry, so that there is one equilibrium, whatever the graph and the training. It
depends on nodes at any distance.
"""

import argparse
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from implicit import FixedPointLayer, Implicit
from implicit.optima import project_l1_ball
from solvers import Stopping
from solvers.linear import GMRES, Richardson

NUM_CLASSES, NUM_FEATURES, NUM_CHAINS = 2, 100, 20  # chains of each class


def make_chains(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The adjacency matrix (N, N) of all chains, the features (N, 100) and the labels (N,) of the nodes."""
    num_chains = NUM_CLASSES * NUM_CHAINS
    chain = torch.diag(torch.ones(length - 1), -1)  # each node has a link from the one before
    adjacency = torch.block_diag(*[chain] * num_chains).to_sparse()
    labels = torch.arange(NUM_CLASSES).repeat_interleave(NUM_CHAINS * length)
    features = torch.zeros(len(labels), NUM_FEATURES)
    features[::length] = F.one_hot(labels[::length], NUM_FEATURES).float()
    return adjacency, features, labels


class GraphMap(nn.Module):
    """The map X -> relu(A X W + U) of node states X (N, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        nn.init.uniform_(self.weight, -1 / width, 1 / width)

    def forward(self, x: Tensor, u: Tensor, adjacency: Tensor) -> Tensor:
        return F.relu(adjacency @ (x @ self.weight) + u)


class ImplicitGraphNetwork(nn.Module):
    """Features (N, 100) of nodes and their adjacency matrix (N, N) -> logits (N, classes)."""

    def __init__(self, width: int, kappa: float = 0.98) -> None:
        super().__init__()
        self.kappa = kappa
        self.inject = nn.Linear(NUM_FEATURES, width, bias=False)
        # The nodes of the graph are one coupled problem. News travels down a chain link by link, in plain steps that
        # contract in the largest entry; there is no shortcut for a Krylov method or Anderson acceleration to find.
        # Where a residual does not fall in the root mean square for a step, GMRES needs a basis for the whole chain.
        plain = Richardson(max_rate=0.999, max_steps=1000, otherwise=GMRES(restart=200, max_steps=1000))
        self.map = GraphMap(width)
        self.equilibrium = FixedPointLayer(
            self.map,
            solver="picard",
            backward=Implicit(linear_solver=plain),
            batch_dims=0,
            stopping=Stopping(rtol=1e-5, norm="max", max_steps=1000, patience=1000),
        )
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        return self.head(self.equilibrium(self.inject(features), adjacency))  # type: ignore[no-any-return]

    @torch.no_grad()
    def project(self) -> None:
        """Bring W back to the nearest matrix for which the map contracts by kappa."""
        self.map.weight.copy_(project_l1_ball(self.map.weight.T, self.kappa).T)


class GraphConvolutions(nn.Module):
    """The rival: layers relu((I + A) / 2 (X W + b)), in each of which information goes one link further."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        widths = [NUM_FEATURES] + layers * [width]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        for layer in self.layers:
            features = layer(features)
            features = F.relu((features + adjacency @ features) / 2)
        return self.head(features)  # type: ignore[no-any-return]


def split(labels: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The nodes (N,) bool to train on, a twentieth at random, and the rest."""
    training = torch.zeros(len(labels), dtype=torch.bool)
    training[torch.randperm(len(labels))[: max(len(labels) // 20, 4 * NUM_CLASSES)]] = True
    return training, ~training


def train(network: nn.Module, features: Tensor, adjacency: Tensor, labels: Tensor, rows: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = F.cross_entropy(network(features, adjacency)[rows], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(network, ImplicitGraphNetwork):
            network.project()


@torch.no_grad()
def accuracy(network: nn.Module, features: Tensor, adjacency: Tensor, labels: Tensor, rows: Tensor) -> float:
    return float((network(features, adjacency).argmax(dim=1) == labels)[rows].double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[10, 25, 50, 100], help="of the chains %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="training steps [%(default)s]")
    parser.add_argument("--width", type=int, default=16, help="of the states [%(default)s]")
    options = parser.parse_args()
    if min(options.steps, options.width, *options.lengths) < 1:
        parser.error("--lengths, --steps and --width must be at least 1")
    print("length   implicit   4 layers   steps of the solver")
    for length in options.lengths:
        torch.manual_seed(0)
        adjacency, features, labels = make_chains(length)
        training, rest = split(labels, length)
        implicit, layers = ImplicitGraphNetwork(options.width), GraphConvolutions(options.width, layers=4)
        for network in (implicit, layers):
            train(network, features, adjacency, labels, training, options.steps)
        with torch.no_grad():
            _, solution = implicit.equilibrium(implicit.inject(features), adjacency, return_solution=True)
        found = [accuracy(network, features, adjacency, labels, rest) for network in (implicit, layers)]
        print(f"{length:>6}{found[0]:>11.1%}{found[1]:>11.1%}{int(solution.num_steps):>22}", flush=True)


if __name__ == "__main__":
    main()

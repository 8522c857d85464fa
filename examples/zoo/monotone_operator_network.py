"""Train a monotone operator network (Winston and Kolter 2020), and solve it by operator splitting, which cannot fail.

python examples/zoo/monotone_operator_network.py
    Trains on scikit-learn's digits with Peaceman-Rachford splitting, and prints the accuracy on the 450 test images.
    Then solves the network before, during and after training by several methods, from several starts: both splitting
    methods always converge, and to one point, while plain iteration diverges. Less than a minute on two cores.

The network is the fixed point of z = relu(W z + U x + b), with weights of the form

    W = (1 - m) I - A'A + B - B',    so that    I - W >= m I    for all A and B.

The inclusion that z solves is then strongly monotone: there is exactly one solution, whatever the training does to A
and B. W itself may be large, so that z -> relu(W z + ...) need not contract. Two splitting methods alternate between
the linear part and relu, which is the proximal operator of the constraint z >= 0:

- forward-backward:   z <- relu(z - a ((I - W) z - U x - b)), for every step a < 2 m / L^2 with L = |I - W|,
- Peaceman-Rachford:  reflections by the two resolvents, for every step a > 0.

A solver of this library sees a map f, and not its linear part. So the state is y = W z + x with z = relu(y), the input
of relu, and f(y) = W relu(y) + x: the map tells the linear part at z. Both methods iterate on a v with z = relu(v),
whose negative part ends at a times that of y; `scaled` converts one to the other.
"""

import argparse
import dataclasses
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from implicit import FixedPointLayer
from solvers import Picard, Solver, State, Stopping, solve

Map = Callable[[Tensor], Tensor]


class MonotoneWeight(nn.Module):
    """The parametrization W = (1 - m) I - A'A + B - B' of a square weight."""

    def __init__(self, m: float) -> None:
        super().__init__()
        self.m = m

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (1 - self.m) * torch.eye(len(a), dtype=a.dtype, device=a.device) - a.T @ a + b - b.T

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Where A and B begin, given the initial weight."""
        return weight, torch.randn_like(weight) / len(weight) ** 0.5


class MonotoneMap(nn.Module):
    """The map y -> W relu(y) + x, for y and x (B, width)."""

    def __init__(self, width: int, m: float) -> None:
        super().__init__()
        self.m = m
        self.linear = nn.Linear(width, width, bias=False)
        parametrize.register_parametrization(self.linear, "weight", MonotoneWeight(m))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.linear(F.relu(y)) + x  # type: ignore[no-any-return]


class MonotoneNetwork(nn.Module):
    """Images (B, 64) -> logits (B, 10)."""

    def __init__(self, width: int = 64, m: float = 1.0) -> None:
        super().__init__()
        self.inject = nn.Linear(64, width)
        self.map = MonotoneMap(width, m)
        solver = PeacemanRachford(linear=self.map.linear)
        self.equilibrium = FixedPointLayer(self.map, solver=solver, max_steps=200)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.equilibrium(self.inject(images))))  # type: ignore[no-any-return]


def scaled(v: Tensor, factor: float | Tensor) -> Tensor:
    """Multiply the negative entries of v by a factor."""
    return torch.where(v > 0, v, v * factor)


class SplittingState(State):
    """A state of operator splitting, which converges where the map itself expands."""

    @property
    def image_is_nearer(self) -> bool:
        return False


@dataclasses.dataclass
class ForwardBackwardState(SplittingState):
    length: Tensor  # (B,) the step a


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardBackward(Solver):
    """v <- z - a ((I - W) z - x) with z = relu(v), in one call of the map per step.

    Args:
        linear: The layer with the weight W.
        m: The strong monotonicity of I - W.
        share: The step as a part of 2 m / L^2, in (0, 1).
    """

    linear: nn.Linear
    m: float
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"ForwardBackward(share=...) must be in (0, 1) to converge, got {self.share!r}.")

    def init(self, f: Map, z0: Tensor) -> ForwardBackwardState:
        weight = self.linear.weight
        operator = torch.eye(len(weight), dtype=weight.dtype, device=weight.device) - weight
        length = 2 * self.m * self.share / torch.linalg.matrix_norm(operator, 2) ** 2
        return ForwardBackwardState(z=z0, fz=f(z0), length=length.expand(len(z0)))

    def step(self, f: Map, state: ForwardBackwardState) -> ForwardBackwardState:
        step = state.length.unsqueeze(1)  # (B, 1)
        y = scaled(torch.lerp(F.relu(state.z), state.fz, step), 1 / step)
        return dataclasses.replace(state, z=y, fz=f(y))


@dataclasses.dataclass
class PeacemanRachfordState(SplittingState):
    resolvent: Callable[[Tensor], Tensor]  # x -> (I + a (I - W))^{-1} x, the same for all samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeacemanRachford(Solver):
    """u = 2 relu(v) - v;  v <- 2 (I + a (I - W))^{-1} (u + a x) - u.

    Args:
        linear: The layer with the weight W.
        length: The step a > 0.
    """

    linear: nn.Linear
    length: float = 1.0

    def __post_init__(self) -> None:
        if not self.length > 0:
            raise ValueError(f"PeacemanRachford(length=...) must be > 0, got {self.length!r}.")

    def init(self, f: Map, z0: Tensor) -> PeacemanRachfordState:
        weight = self.linear.weight
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        factors = torch.linalg.lu_factor(identity + self.length * (identity - weight))
        return PeacemanRachfordState(
            z=z0, fz=f(z0), resolvent=lambda x: torch.linalg.lu_solve(*factors, x.T.contiguous()).T
        )

    def step(self, f: Map, state: PeacemanRachfordState) -> PeacemanRachfordState:
        z = F.relu(state.z)
        x = state.fz - self.linear(z)
        reflected = 2 * z - scaled(state.z, self.length)
        v = 2 * state.resolvent(reflected + self.length * x) - reflected
        y = scaled(v, 1 / self.length)
        return dataclasses.replace(state, z=y, fz=f(y))


def load_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 64) to train on and 450 to test with, and their labels (N,) likewise."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=450, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return train_images.float(), test_images.float(), train_labels, test_labels


def train(network: MonotoneNetwork, images: Tensor, labels: Tensor, epochs: int, batch_size: int = 64) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch_size):
            loss = F.cross_entropy(network(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def report_guarantee(network: MonotoneNetwork, images: Tensor) -> None:
    """Solve by several methods, each from three starts, and print the steps and how far apart the answers are."""
    f, x = network.map, network.inject(images)
    for name, solver in solvers(f).items():
        starts = (torch.zeros_like(x), torch.randn_like(x), 100 * torch.randn_like(x))
        stopping = Stopping(rtol=1e-5, max_steps=5000)
        found = [solve(f, start, solver, args=(x,), stopping=stopping, on_failure="ignore") for start in starts]
        share = sum(solution.converged.double().mean() for solution in found) / len(found)
        steps = max(int(solution.num_steps.max()) for solution in found)
        values = torch.stack([F.relu(solution.value) for solution in found])
        spread = (values - values[0]).norm() / values[0].norm()
        print(f"    {name:<28}{share:>7.0%} solved, in at most {steps:>4} steps, {spread:.0e} apart")


def solvers(f: MonotoneMap) -> dict[str, Solver]:
    return {
        "plain iteration": Picard(),
        "forward-backward": ForwardBackward(linear=f.linear, m=f.m),
        "Peaceman-Rachford, a = 0.3": PeacemanRachford(linear=f.linear, length=0.3),
        "Peaceman-Rachford, a = 1": PeacemanRachford(linear=f.linear),
        "Peaceman-Rachford, a = 3": PeacemanRachford(linear=f.linear, length=3.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training images [%(default)s]")
    parser.add_argument("--width", type=int, default=64, help="units of the state [%(default)s]")
    options = parser.parse_args()
    if options.epochs < 1 or options.width < 2:
        parser.error("--epochs must be at least 1, and --width at least 2")
    torch.manual_seed(0)
    train_images, test_images, train_labels, test_labels = load_split()
    network = MonotoneNetwork(options.width)
    report_guarantee(network, test_images)
    train(network, train_images, train_labels, options.epochs)
    with torch.no_grad():
        print(f"test accuracy {(network(test_images).argmax(1) == test_labels).double().mean():.1%}")
    report_guarantee(network, test_images)


if __name__ == "__main__":
    main()

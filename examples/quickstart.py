"""Use an implicit layer in your own model: its output is the solution of an equation, z = f(z, x).

python examples/quickstart.py
    Trains a classifier in a few seconds. Prints its accuracy, the number of samples that were solved, and the residual
    of the linear solve of the gradient.
"""

import torch
from torch import nn

from implicit import FixedPointLayer, spectral_norm


class Cell(nn.Module):
    """The map z -> tanh(W z + U x). Bounding the norm of W makes it a contraction, so a fixed point exists."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.w = spectral_norm(nn.Linear(width, width))
        self.u = nn.Linear(inputs, width)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.w(z) + self.u(x))


torch.manual_seed(0)
x = torch.rand(500, 2) * 2 - 1
label = (x[:, 0] * x[:, 1] > 0).long()  # no linear classifier can tell these apart

layer = FixedPointLayer(Cell(2, 16), init=lambda x: x.new_zeros(x.shape[0], 16))
head = nn.Linear(16, 2)
optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.02)
for _ in range(150):
    z, solution = layer(x, return_solution=True)
    loss = nn.functional.cross_entropy(head(z), label)
    optimizer.zero_grad()
    loss.backward()  # uses the implicit function theorem; the solver's steps are not stored
    optimizer.step()

print(f"accuracy {(head(z).argmax(1) == label).float().mean():.0%}")
print(f"solved {int(solution.converged.sum())} of {len(x)} samples in {solution.num_evals} calls of the map")
assert solution.adjoint is not None  # the backward pass has filled it in
print(f"linear solve of the gradient: {int(solution.adjoint.converged.sum())} of {len(x)} samples")

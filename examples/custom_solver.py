"""Write your own fixed-point solver, compare it with the library's solvers, and test it.

python examples/custom_solver.py
    Prints the steps and residuals of three solvers. Aitken's relaxation, which remembers one step, needs a third of
    Picard's steps, about as many as Anderson with a memory of five.

pytest examples/custom_solver.py
    Runs the library's conformance tests on the solver. All of them pass, in a few seconds.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from solvers import Anderson, Picard, Solver, State, solve
from solvers.testing import SolverConformance


@dataclasses.dataclass
class AitkenState(State):
    """Holds the iterate z and its image fz, as every state does, and the length of the next step."""

    step_length: Tensor  # (B, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aitken(Solver):
    """Aitken's relaxation for vectors (Irons and Tuck 1969): each sample gets its step length from its last two steps.

    Let g = f(z) - z before a step, and let dg be the change of g in that step. Then

        z <- z + length * g,    length <- -length * (g . dg) / (dg . dg).

    Args:
        first: The length of the first step.
    """

    first: float = 1.0

    def init(self, f: Callable[[Tensor], Tensor], z0: Tensor) -> AitkenState:
        return AitkenState(z=z0, fz=f(z0), step_length=z0.new_full((len(z0), 1), self.first))

    def step(self, f: Callable[[Tensor], Tensor], state: AitkenState) -> AitkenState:
        g = state.fz - state.z  # (B, D)
        z = state.z + state.step_length * g
        fz = f(z)
        dg = (fz - z) - g
        # Each row is computed by itself. Solved samples no longer change, so guard against a division by zero.
        square = (dg * dg).sum(dim=1, keepdim=True)  # (B, 1)
        ratio = -(g * dg).sum(dim=1, keepdim=True) / torch.where(square > 0, square, 1.0)
        return AitkenState(z=z, fz=fz, step_length=state.step_length * torch.where(square > 0, ratio, 1.0))

    def restarted(self, state: AitkenState, rows: Tensor, z: Tensor, fz: Tensor) -> AitkenState:
        # The driver takes samples back whose step led nowhere; the step length that led them there must go too.
        state = super().restarted(state, rows, z, fz)
        return dataclasses.replace(state, step_length=state.step_length.masked_fill(rows.unsqueeze(1), self.first))


class TestAitken(SolverConformance):
    solver = Aitken()


def main():
    torch.manual_seed(0)
    weight = torch.randn(50, 50, dtype=torch.float64)
    weight = 0.95 * (weight + weight.T) / torch.linalg.matrix_norm(weight + weight.T, 2)
    x = 0.1 * torch.randn(100, 50, dtype=torch.float64)

    def f(z, x):
        return torch.tanh(z @ weight + x)

    print(f"{'solver':10}{'steps: median':>15}{'most':>6}{'largest residual':>18}")
    for solver in (Picard(), Aitken(), Anderson(memory=5)):
        solution = solve(f, 0 * x, solver, args=(x,), rtol=1e-8, atol=0, max_steps=500, on_failure="raise")
        name, steps = type(solver).__name__, solution.num_steps
        print(f"{name:10}{steps.median():15}{steps.max():6}{solution.residual.max():18.1e}")


if __name__ == "__main__":
    main()

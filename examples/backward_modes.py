"""Compare the gradients and the costs of all backward modes on one small problem.

python examples/backward_modes.py
    Solves a layer z = tanh(W z + x) for 64 states of size 32 and differentiates a loss of the solution. For each mode,
    prints a few entries of the gradient, its relative distance from the exact one, the calls of the map and the
    vector-Jacobian products with it in both passes, the bytes kept for the backward pass, and the mode that the
    solution names.
"""

import torch

from implicit import SHINE, fixed_point, get_backward
from solvers import Broyden
from solvers.linear import GMRES

MODES = {
    "unrolled": get_backward("unrolled"),
    "checkpointed": get_backward("checkpointed", segments=3),
    "implicit": get_backward("implicit"),
    "implicit, GMRES": get_backward("implicit", linear_solver=GMRES(rtol=1e-10)),
    "neumann, 5 terms": get_backward("neumann", terms=5),
    "phantom, 5 steps": get_backward("phantom", steps=5),
    "jfb": get_backward("jfb"),
    "shine": get_backward("shine", fallback=None),
    "shine, refined": get_backward("shine", max_residual=0.1),
    "auto": get_backward("auto"),
}


class Products(torch.autograd.Function):
    """The identity function; it counts the backward passes through it."""

    @staticmethod
    def forward(ctx, counts, output):
        ctx.counts = counts
        return output.clone()

    @staticmethod
    def backward(ctx, cotangent):
        ctx.counts["products"] += 1
        return None, cotangent


def main():
    torch.manual_seed(0)
    x, target, weight = (torch.randn(n, 32, dtype=torch.float64) for n in (64, 64, 32))
    weight = (0.8 * weight / torch.linalg.matrix_norm(weight, 2)).requires_grad_()

    def gradient(mode):
        """Return the gradient of the loss with respect to the weight, the counts, the bytes kept and the solution."""
        counts = {"calls": 0, "products": 0}
        saved = {}

        def f(z, x, weight):
            counts["calls"] += 1
            return Products.apply(counts, torch.tanh(z @ weight.T + x))

        def save(tensor):
            saved[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            options = {"rtol": 1e-8, "max_steps": 100, "return_solution": True}
            z, solution = fixed_point(f, 0 * x, x, weight, solver=Broyden(), backward=mode, **options)
        if isinstance(solution.backward, SHINE):
            saved |= {0: solution.state.inverse.u, 1: solution.state.inverse.v}
        num_bytes = sum(tensor.nbytes for tensor in saved.values())
        loss = (z - target).square().mean()
        return torch.autograd.grad(loss, weight)[0], counts, num_bytes, solution

    exact = gradient(MODES["implicit, GMRES"])[0]
    entries = "".join(f"{f'dL/dW[{i},{i}]':>11}" for i in range(4))
    print(f"{'backward mode':<18}{entries}{'error':>9}{'calls':>7}{'products':>10}{'bytes':>9}  named")
    for name, mode in MODES.items():
        found, counts, num_bytes, solution = gradient(mode)
        error = (found - exact).norm() / exact.norm()
        row = "".join(f"{value:>11.6f}" for value in found.diagonal()[:4])
        costs = f"{counts['calls']:>7}{counts['products']:>10}{num_bytes:>9}"
        print(f"{name:<18}{row}{error:>9.0e}{costs}  {type(solution.backward).__name__}")


if __name__ == "__main__":
    main()

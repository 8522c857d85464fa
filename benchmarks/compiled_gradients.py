"""Layers with ``compile=True``: solves and gradients beside those that run step by step.

python -m benchmarks.compiled_gradients [--repeats 15] [--shapes 32x64 64x256] [--rates 0.5 0.75 0.9 0.95]

The layer solves ``z = r sin(z W) + tanh(x U)``, with W orthogonal, by Anderson acceleration to 1e-5, its gradient by
the implicit mode; what x gives is computed once in a compiled solve. One thread, float32; the two forms alternate, and
times are medians of processor time in milliseconds, "gradient" that of the backward pass of a sum. "products" are those
with the Jacobian. "first" is how long the first solve and its gradient took when they were compiled, in seconds.
"""

import functools
import statistics
import sys
import time

if not __package__:
    sys.exit("Start it as a module: python -m benchmarks.compiled_gradients")

import torch
from torch import Tensor, nn

from benchmarks.timing import begin, parser
from implicit import FixedPointLayer


class Map(nn.Module):
    def __init__(self, unknowns: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.inner = nn.Parameter(torch.linalg.qr(torch.randn(unknowns, unknowns))[0])
        self.injection = nn.Parameter(torch.randn(unknowns, unknowns) / unknowns**0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.rate * torch.sin(z @ self.inner) + torch.tanh(x @ self.injection)


def timed(layer: FixedPointLayer, x: Tensor) -> tuple[float, float, int]:
    """Processor time of a solve and of its gradient in milliseconds, and the number of products."""
    layer.zero_grad()
    start = time.process_time()
    value, solution = layer(x, return_solution=True)
    solved = time.process_time()
    value.sum().backward()
    assert solution.adjoint is not None
    return 1e3 * (solved - start), 1e3 * (time.process_time() - solved), solution.adjoint.num_evals


def main() -> None:
    """Print the table."""
    options = parser(__doc__, threads=1, repeats=15)
    options.add_argument("--shapes", nargs="*", default=["32x64", "64x256"], metavar="64x256", help="[%(default)s]")
    options.add_argument("--rates", nargs="*", type=float, default=[0.5, 0.75, 0.9, 0.95], help="[%(default)s]")
    given = options.parse_args()
    begin(given.threads)
    columns = ["state", "rate", "solve, ms", "compiled", "ratio", "products", "compiled", "gradient, ms", "compiled"]
    columns += ["ratio", "first, s"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for shape in given.shapes:
        samples, unknowns = map(int, shape.split("x"))
        for rate in given.rates:
            torch.manual_seed(0)
            f, x = Map(unknowns, rate), torch.randn(samples, unknowns)
            make = functools.partial(FixedPointLayer, f, solver="anderson", rtol=1e-5)
            layers = [make(compile=compile) for compile in (False, True)]
            start = time.perf_counter()
            products = [timed(layer, x)[2] for layer in layers]
            first = time.perf_counter() - start
            times = [[timed(layer, x)[:2] for layer in layers] for _ in range(given.repeats)]
            forms = zip(*times, strict=True)
            solve, gradient = zip(
                *([statistics.median(s) for s in zip(*form, strict=True)] for form in forms), strict=True
            )
            cells = [shape, rate, *(f"{ms:.2f}" for ms in (*solve, solve[0] / solve[1])), *products]
            cells += [f"{ms:.2f}" for ms in (*gradient, gradient[0] / gradient[1])]
            print(f"| {' | '.join(map(str, [*cells, f'{first:.1f}']))} |", flush=True)


if __name__ == "__main__":
    main()

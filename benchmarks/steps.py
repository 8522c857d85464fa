"""What a step of a solve costs beside its call of the map: operations, looks at the host, and time.

python -m benchmarks.steps [--threads 1] [--repeats 15]

Prints a Markdown table for problems of the bank in float32, solved to 1e-5. "Operations" are PyTorch operations per
step without those of the map. "Looks" are copies of values to the host during the whole solve, for which an accelerator
has to finish; there should be at most one per step. "us over f" is the median time of a step without that of a call of
the map.
"""

import functools
import sys
from typing import Any

if not __package__:
    # Started by its path, it would be imported instead of the package of the same name.
    sys.exit("Start it as a module: python -m benchmarks.steps")

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import begin, medians_ms, parser
from solvers import Anderson, Auto, Broyden, Picard, Squarem, solve
from solvers.testing import BANK

PROBLEMS = ["linear 0.5", "linear 0.9", "mixed", "tanh"]
SOLVERS = {
    "picard": Picard(),
    "anderson 5": Anderson(),
    "broyden": Broyden(),
    "squarem": Squarem(),
    "auto": Auto(),
}
LOOKS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}


class Counts(TorchDispatchMode):
    """Counts operations, and those that copy values to the host, among them ``tolist``, which is none on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.looks = 0
        self._tolist = Tensor.tolist

    def __enter__(self) -> "Counts":
        def counted(tensor: Tensor) -> Any:
            self.looks += 1
            return self._tolist(tensor)

        Tensor.tolist = counted  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        Tensor.tolist = self._tolist  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.looks += func._schema.name in LOOKS
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def main() -> None:
    """Print the table."""
    options = parser(__doc__, threads=1, repeats=15).parse_args()
    begin(options.threads)
    print("\n| problem | solver | steps | looks | operations | us over f |\n|---|---|---|---|---|---|")
    for name in PROBLEMS:
        problem = BANK[name](torch.float32)
        with Counts() as of_f:
            problem.f(problem.z0)
        (f_ms,) = medians_ms([functools.partial(problem.f, problem.z0)], 20 * options.repeats)
        for label, solver in SOLVERS.items():

            def run(problem=problem, solver=solver):
                return solve(problem.f, problem.z0, solver, rtol=1e-5, atol=0, max_steps=400, on_failure="ignore")

            with Counts() as counts:
                solution = run()
            steps = int(solution.num_steps.max())
            operations = (counts.operations - of_f.operations * solution.num_evals) / steps
            (ms,) = medians_ms([run], options.repeats)
            us = 1e3 * (ms / steps - f_ms)
            print(f"| {name} | {label} | {steps} | {counts.looks} | {operations:.0f} | {us:.0f} |", flush=True)


if __name__ == "__main__":
    main()

"""How often a solve waits for the device: at most once per tested step, whatever the mixture of samples."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from solvers import Anderson, Broyden, Picard, Squarem, solve

SOLVERS = [Picard(), Anderson(), Anderson(memory=10), Broyden(), Broyden(method="bad", memory=10), Squarem()]


class Looks(TorchDispatchMode):
    """Counts what copies values to the host: operations that do, and ``tolist``, which is none on the CPU."""

    OPERATIONS = {
        "aten::_local_scalar_dense",
        "aten::is_nonzero",
        "aten::nonzero",
        "aten::equal",
        "aten::masked_select",
    }

    def __init__(self, monkeypatch):
        super().__init__()
        self.number = 0
        tolist = torch.Tensor.tolist

        def counted(tensor):
            self.number += 1
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func._schema.name in self.OPERATIONS
        return func(*args, **(kwargs or {}))


def mixture(dtype=torch.float64):
    """Contractions of rates .05 to .97, and samples that are solved at once, cycle, and diverge."""
    rate = torch.cat((torch.linspace(0.05, 0.97, 60), torch.tensor([0.0, -1.0, 1.7, 3.0]))).to(dtype).unsqueeze(1)
    shift = torch.randn(64, 16, dtype=dtype)
    return lambda z: rate * torch.where(rate.abs() < 1, torch.tanh(z), z) + shift, torch.zeros_like(shift)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("compact", [False, True], ids=["held", "compact"])
def test_one_look_per_step_on_a_mixture(solver, compact, monkeypatch):
    f, z0 = mixture()
    rate = torch.linspace(0.05, 0.97, 64, dtype=z0.dtype).unsqueeze(1)

    def contraction(z, rate, shift):
        return rate * torch.tanh(z) + shift

    shift = torch.randn_like(z0)
    with torch.no_grad(), Looks(monkeypatch) as looks:
        solution = solve(
            contraction, z0, solver, args=(rate, shift), rtol=1e-8, max_steps=500, compact=compact, on_failure="ignore"
        )
        taken = looks.number
    # One more for the report at the end.
    assert taken <= solution.history_steps + 1 if hasattr(solution, "history_steps") else True
    steps = int(solution.num_steps.max())
    assert solution.converged.all()
    assert len(solution.num_steps.unique()) > 3
    assert taken <= steps

"""How often a solve waits for the device: at most once per tested step, whatever the mixture of samples."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from solvers import Anderson, Broyden, Picard, Squarem, Status, solve

SOLVERS = [Picard(), Anderson(), Anderson(memory=10), Broyden(), Broyden(method="bad", memory=10), Squarem()]
OPERATIONS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}


class Looks(TorchDispatchMode):
    """Counts the operations that copy values to the host, and ``tolist``, which is no operation on the CPU."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.number = 0
        tolist = torch.Tensor.tolist

        def counted(tensor):
            self.number += 1
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func._schema.name in OPERATIONS
        return func(*args, **(kwargs or {}))


def contractions(z, rate, shift):
    return rate * torch.tanh(z) + shift


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("compact", [False, True], ids=["held", "compact"])
@pytest.mark.parametrize("rtol", [1e-4, 1e-9])
def test_one_look_per_step_where_samples_end_at_different_steps(solver, compact, rtol, monkeypatch):
    rate = torch.linspace(0.05, 0.97, 64, dtype=torch.float64).unsqueeze(1)
    shift = torch.randn(64, 16, dtype=torch.float64)
    options = {"args": (rate, shift), "rtol": rtol, "max_steps": 500, "compact": compact, "on_failure": "ignore"}
    with torch.no_grad(), Looks(monkeypatch) as looks:
        solution = solve(contractions, torch.zeros_like(shift), solver, **options)
        taken = looks.number
    assert solution.converged.all()
    assert len(solution.num_steps.unique()) > 3
    assert taken <= int(solution.num_steps.max())


def test_one_look_per_step_beside_samples_that_cycle_and_run_away(monkeypatch):
    rate = torch.cat((torch.linspace(0.05, 0.9, 61), torch.tensor([0.0, -1.0, 1.02]))).double().unsqueeze(1)
    with torch.no_grad(), Looks(monkeypatch) as looks:
        solution = solve(
            lambda z: rate * z + 1, torch.zeros(64, 3).double(), Picard(), max_steps=300, on_failure="ignore"
        )
        taken = looks.number
    assert {Status.CONVERGED, Status.STAGNATED} <= {Status(status) for status in solution.status.unique().tolist()}
    assert taken <= int(solution.num_steps.max())


@pytest.mark.parametrize("every", [3, 7])
def test_no_look_between_tests(every, monkeypatch):
    rate = torch.linspace(0.05, 0.97, 64, dtype=torch.float64).unsqueeze(1)
    with torch.no_grad(), Looks(monkeypatch) as looks:
        solution = solve(
            lambda z: rate * torch.tanh(z) + 1, torch.zeros(64, 3).double(), Picard(), max_steps=500, check_every=every
        )
        taken = looks.number
    assert solution.converged.all()
    # The first and each tested step, and one for the report at the end.
    assert taken <= 2 + int(solution.num_steps.max()) // every


def test_a_fixed_number_of_steps_looks_at_nothing(monkeypatch):
    with torch.no_grad(), Looks(monkeypatch) as looks:
        for solver in SOLVERS:
            solve(torch.cos, torch.ones(4, 3), solver, rtol=None, atol=None, max_steps=9)
        assert looks.number == 0

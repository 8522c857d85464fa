"""What the diagnosis does not say: causes and cures that the map at hand disproves."""

import pytest
import torch
from torch import nn

from implicit import FixedPointLayer, diagnose
from implicit.diagnostics import Cause
from solvers import Stopping


@pytest.mark.parametrize("shift", [lambda z: -0.3 * z.mean(0, keepdim=True), lambda z: 0.1 * torch.rand_like(z)])
def test_eval_mode_is_proposed_only_where_it_cures(shift):
    class Stubborn(nn.Module):
        def forward(self, z, x):
            return 0.5 * z + x + shift(z)

    report = diagnose(FixedPointLayer(Stubborn(), on_failure="ignore"), torch.randn(4, 5)).layers[""]
    assert report.causes[0] in {Cause.SAMPLES_MIX, Cause.MAP_CHANGES}
    mixes = report.causes[0] is Cause.SAMPLES_MIX
    assert (report.proposal.setting if mixes else report.proposal) == ("batch_dims=0" if mixes else None)


@pytest.mark.parametrize("seed", range(6))
def test_a_steep_map_is_not_taken_for_a_coarse_one(seed):
    torch.manual_seed(seed)
    layer = FixedPointLayer(lambda z, x: -torch.tanh(200 * z) + x, on_failure="ignore")
    report = diagnose(layer, torch.randn(4, 20)).layers[""]
    assert not {Cause.PRECISION_FLOOR, Cause.TOLERANCE_TOO_TIGHT} & set(report.causes)


@pytest.mark.parametrize("diagonal", [0.3, 0.5])
def test_rounded_eigenvalues_do_not_make_an_expansion(diagonal):
    """In float32 the computed eigenvalues of such a matrix are larger than 1."""
    matrix = diagonal * torch.eye(12) + torch.diag(torch.full((11,), 4.0), 1)
    layer = FixedPointLayer(lambda z, x: z @ matrix.T + x, solver="picard", max_steps=25, on_failure="ignore")
    report = diagnose(layer, torch.randn(3, 12)).layers[""]
    assert report.causes == (Cause.TRANSIENT,)


@pytest.mark.parametrize("solver", ["anderson", "broyden", "auto"])
def test_one_coupled_problem_that_fails(solver):
    torch.manual_seed(0)
    matrix = 0.3 * torch.randn(3, 3)
    layer = FixedPointLayer(
        lambda z, x: z @ matrix + x, solver=solver, batch_dims=0, max_steps=2, rtol=1e-6, on_failure="ignore"
    )
    report = diagnose(layer, torch.ones(2, 3)).layers[""]
    assert report.causes == (Cause.TOO_FEW_STEPS,)
    assert report.proposal is not None


def test_a_proposal_with_more_patience_is_a_program():
    def far(z, x):
        return z + torch.tanh(200 + x - z)

    report = diagnose(FixedPointLayer(far, solver="picard", rtol=1e-3, on_failure="ignore"), torch.randn(4, 5)).layers[
        ""
    ]
    assert report.proposal is not None
    options = eval(f"dict({report.proposal.setting})", {"Stopping": Stopping, "dict": dict})
    layer = FixedPointLayer(far, solver="picard", **options)
    assert layer(torch.randn(4, 5), return_solution=True)[1].converged.all()

"""Models that the doctor takes: built in inference mode, and with keyword inputs."""

import random

import pytest
import torch
from torch import nn

from implicit import FixedPointLayer, diagnose
from implicit.diagnostics import Cause


@pytest.mark.parametrize("rate", [0.5, -1.5], ids=["healthy", "sick"])
def test_model_that_was_built_in_inference_mode_is_diagnosed(rate):
    with torch.inference_mode():
        linear = nn.Linear(3, 3, bias=False)
        linear.weight.copy_(rate * torch.eye(3))
        layer = FixedPointLayer(lambda z, x: linear(z) + x, solver="picard", on_failure="ignore")
        model, x = nn.Sequential(linear, layer, nn.BatchNorm1d(3)), torch.randn(4, 3)
    mean = model[2].running_mean
    assert diagnose(model, x).healthy == (rate == 0.5)
    assert model[2].running_mean is mean
    assert not mean.any()
    assert linear.weight.is_inference()


def test_keyword_inputs_reach_the_model():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = FixedPointLayer(lambda z, x, rate: rate * z + x, solver="picard", on_failure="ignore")

        def forward(self, x, *, rate):
            return self.layer(x, rate)

    model, x = Scaled(), torch.ones(2, 3)
    assert diagnose(model, x, kwargs={"rate": 0.5}).healthy
    assert diagnose(model, x, kwargs={"rate": torch.tensor(-1.5)}).causes == (Cause.OSCILLATION,)
    with pytest.raises(TypeError, match="rate"):
        diagnose(model, x)


def test_what_a_model_changes_besides_its_tensors_stays_changed():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = FixedPointLayer(lambda z, x: 0.5 * z + x)
            self.norm = nn.BatchNorm1d(3)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            random.random()
            return self.norm(self.layer(x + torch.rand(3)))

    model = Counting()
    ours, python = torch.get_rng_state(), random.getstate()
    diagnose(model, torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), ours)
    assert not model.norm.running_mean.any()
    assert model.calls == 2
    assert random.getstate() != python

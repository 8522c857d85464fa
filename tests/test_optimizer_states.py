"""The state of every optimizer goes through a checkpoint, and the run goes on as if it had not been stopped."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm.optim
import torch
from torch import nn

from imixer.training.distributed import load_optimizer, whole_state

# PyTorch's own, about how the state dicts of several processes are gathered.
pytestmark = pytest.mark.filterwarnings("ignore")


def usable() -> list[str]:
    """The names of the optimizers that a run can have here; see imixer.training.model.build_optimizer."""
    names = []
    for name in map(str, timm.optim.list_optimizers()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer = timm.optim.create_optimizer_v2(nn.Linear(2, 2), name, lr=0.1)
        except (AssertionError, ImportError, RuntimeError):  # asks for CUDA or another package
            continue
        kept = optimizer.defaults.values()
        if not getattr(optimizer, "is_second_order", False) and not any(isinstance(v, torch.dtype) for v in kept):
            names.append(name)
    return names


def begun(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    return model, timm.optim.create_optimizer_v2(model, name, lr=0.01, weight_decay=0.1)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    torch.manual_seed(number)  # some optimizers draw numbers
    x = torch.rand(5, 4)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", [*usable(), "lookahead_adamw", "lookahead_sgd"])
def test_updates_after_loading_are_those_without(name: str) -> None:
    model, optimizer = begun(name)
    before = 10 if name.startswith("lookahead") else 3  # which goes back to its slow weights in every sixth update
    for number in range(before):
        update(model, optimizer, number)
    weights, state = whole_state(model, optimizer)
    weights, state = copy.deepcopy((weights, state))  # they are the tensors of the model and the optimizer
    other, loaded = begun(name)
    other.load_state_dict(weights)
    load_optimizer(other, loaded, state, weights)
    for key, value in other.state_dict().items():
        assert torch.equal(value, weights[key])
    for number in range(before, before + 3):
        update(model, optimizer, number)
        update(other, loaded, number)
    for expected, found in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected)
        assert found.isfinite().all()

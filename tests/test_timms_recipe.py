"""Parts of the recipe beside timm's own functions on the same inputs, and runs with them that are stopped and go on."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import Lookahead, create_optimizer_v2
from torch import Tensor, nn
from training_runs import LIVELY, TINY, difference, saved

from imixer.data import ImageData
from imixer.training import TrainingInterruptedError, load_data, loop, train
from imixer.training.learner import Learner
from imixer.training.model import create_model, model_arguments
from imixer.training.objective import make_loss, make_mixup, seed_step
from imixer.training.step import TrainingStep, make_optimizer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(TINY)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixes", [False, True])
def test_binary_targets_are_those_of_timms_script(threshold: float | None, smoothing: float, mixes: bool) -> None:
    """It smooths mixed targets by its Mixup, and classes by its loss."""
    alphas: dict[str, Any] = {"mixup": 0.8, "cutmix": 1.0} if mixes else {}
    config = replace(TINY, bce_loss=True, bce_target_thresh=threshold, smoothing=smoothing, **alphas)
    logits, classes = torch.randn(16, 10), torch.arange(16) % 10
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=smoothing, num_classes=10) if mixes else None
    theirs = BinaryCrossEntropy(0.1 if mixes else smoothing, target_threshold=threshold)
    for mixing, loss in ((mixup, theirs), (make_mixup(config, 10), make_loss(config))):
        targets = classes
        if mixing is not None:
            np.random.seed(3)
            _, targets = mixing(torch.rand(16, 1, 8, 8), classes)
        given = logits.clone().requires_grad_()
        losses.append(loss(given, targets))
        gradients += torch.autograd.grad(losses[-1], given)
    assert torch.equal(*losses)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ["imixer_ti4_32", "test_vit"])
def test_blocks_are_dropped_as_by_a_model_of_timms_script(digits: ImageData, name: str) -> None:
    config = replace(TINY, model=name, num_blocks=3 if name == "imixer_ti4_32" else None, embed_dim=None, drop_path=0.4)
    ours = create_model(config, digits)
    nn.init.normal_(ours.get_parameter("head.weight"))  # which starts with zeros
    arguments = model_arguments(config, digits)
    models = [ours]
    del arguments["drop_path_rate"]
    for rate in (0.4, 0.0):
        model = timm.create_model(name, drop_path_rate=rate, **arguments)
        model.load_state_dict(ours.state_dict())
        models.append(model)
    images, found = torch.randn(32, 1, 8, 8), []
    for model in models:
        torch.manual_seed(1)
        found.append(model.train()(images))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"norm": "batch"}, "exp_avg"),
        ({"opt": "nadamw", "bce_loss": True, "bce_target_thresh": 0.2}, "exp_avg"),
        ({"opt": "lookahead_adamw", "opt_kwargs": {"fused": False}}, "lookahead_slow_buff"),
    ],
    ids=["batch norms and their average", "nadamw and binary targets", "lookahead"],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], kept: str
) -> None:
    def signalled(seed: int, epoch: int, step: int, rank: int) -> None:
        if (epoch, step) == (1, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        seed_step(seed, epoch, step, rank)

    config = replace(LIVELY, log_with=("none",), output=str(tmp_path / "stopped"), **changes)
    whole = train(replace(config, output=str(tmp_path / "whole")), digits, progress=False).output
    with monkeypatch.context() as patch:
        patch.setattr(loop, "seed_step", signalled)
        with pytest.raises(TrainingInterruptedError, match="stopped in epoch 2 after step 6 of 27"):
            train(config, digits, progress=False)
    assert all(kept in state for state in saved(tmp_path / "stopped" / "last.pt")["optimizer"]["state"].values())
    train(config, digits, resume=tmp_path / "stopped", progress=False)
    state = saved(whole / "last.pt")
    assert difference(saved(tmp_path / "stopped" / "last.pt"), state) == []
    means = [name for name in state["state_dict"] if name.endswith("running_mean")]
    assert bool(means) == (changes.get("norm") == "batch")
    assert not any(torch.equal(state["state_dict"][name], state["state_dict_ema"][name]) for name in means)


def test_lookahead_is_that_of_timms_script(digits: ImageData) -> None:
    """Which goes back to the slow weights before each test, too."""
    config = replace(TINY, opt="lookahead_adamw", opt_kwargs={"fused": False}, clip_grad=None)
    learner = Learner(config, digits, Accelerator(cpu=True), lr=0.01)
    assert isinstance(learner.optimizer, Lookahead)
    model = create_model(config, digits)
    model.load_state_dict(learner.plain.state_dict())
    optimizer: Any = create_optimizer_v2(model, "lookahead_adamw", lr=0.01, weight_decay=config.weight_decay)
    images, targets = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    loss = make_loss(config)
    for number in range(1, 9):
        learner.add_gradient(images, targets, share=1.0, last=True)
        learner.step.update(number)
        optimizer.zero_grad()
        loss(model(images), targets).backward()
        optimizer.step()
    learner.end_epoch()
    optimizer.sync_lookahead()
    for ours, theirs in zip(learner.plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.grad is None


def test_update_of_lookahead_that_is_not_finite_is_left_out() -> None:
    """The optimizer in it has fused kernels, which would have to be told."""
    model = nn.Linear(3, 2)
    step = TrainingStep(model, nn.functional.mse_loss, make_optimizer(model, opt="lookahead_adamw", lr=0.1))

    def weights() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in model.parameters()]

    step(torch.randn(4, 3), torch.randn(4, 2))
    before = weights()
    assert step(torch.full((4, 3), torch.nan), torch.randn(4, 2))[2] == 0
    assert difference(weights(), before) == []
    assert step(torch.randn(4, 3), torch.randn(4, 2))[2] == 1
    assert difference(weights(), before) != []
    with pytest.raises(
        ValueError, match="--cuda-graph needs an optimizer that can be captured, .*, not lookahead_adam"
    ):
        make_optimizer(model, opt="lookahead_adamw", lr=0.1, capturable=True)

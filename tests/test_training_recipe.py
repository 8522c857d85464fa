"""Every setting of the recipe reaches what it sets: optimizer, schedule, losses, averages, shares of an update."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from timm.layers import DropPath
from torch import Tensor, nn
from training_runs import TINY

from imixer.data import ImageData
from imixer.training import TrainingConfig, evaluation, load_data, loop, train
from imixer.training.distributed import load_optimizer
from imixer.training.learner import Learner
from imixer.training.objective import make_loss, make_mixup, seed_step
from imixer.training.schedule import Schedule
from imixer.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(TINY)


def learner_of(digits: ImageData, **changes: Any) -> Learner:
    return Learner(replace(TINY, **changes), digits, Accelerator(cpu=True), lr=0.25)


def test_optimizer_has_the_settings(digits: ImageData) -> None:
    groups = learner_of(digits, opt_betas=(0.7, 0.8), opt_eps=1e-3, weight_decay=0.3).optimizer.param_groups
    assert {(group["betas"], group["eps"], group["lr"], group["fused"]) for group in groups} == {
        ((0.7, 0.8), 1e-3, 0.25, True)
    }
    assert {group["weight_decay"] for group in groups} == {0, 0.3}
    (group, *_) = learner_of(digits, opt="sgd", momentum=0.6).optimizer.param_groups
    assert group["momentum"] == 0.6
    groups = learner_of(digits, layer_decay=0.5, num_blocks=3).optimizer.param_groups
    assert len({group["lr_scale"] for group in groups}) >= 4
    assert {group["lr_scale"] for group in groups} <= {0.5**depth for depth in range(6)}


@pytest.mark.parametrize(("before", "after"), [(0.05, 0.0), (0.0, 0.05)])
def test_state_of_the_optimizer_goes_on_with_and_without_weight_decay(
    digits: ImageData, before: float, after: float
) -> None:
    """timm makes one group of parameters without it, and two with it."""
    old, new = learner_of(digits, weight_decay=before), learner_of(digits, weight_decay=after)
    old.add_gradient(torch.randn(16, 1, 8, 8), torch.arange(16) % 10, share=1.0, last=True)
    old.step.update(1)
    state = old.state()
    load_optimizer(new.plain, new.optimizer, state["optimizer"], state["state_dict"])
    assert max(group["weight_decay"] for group in new.optimizer.param_groups) == after
    for theirs, ours in zip(old.plain.parameters(), new.plain.parameters(), strict=True):
        for name, value in old.optimizer.state[theirs].items():
            assert torch.equal(new.optimizer.state[ours][name], value)


@pytest.mark.parametrize("clip", [1e-3, 1e-2])
def test_gradients_are_clipped_as_they_are_set(digits: ImageData, clip: float) -> None:
    learner = learner_of(digits, opt="momentum", weight_decay=0.0, clip_grad=clip)
    before = [parameter.detach().clone() for parameter in learner.plain.parameters()]
    learner.add_gradient(torch.randn(16, 1, 8, 8), torch.arange(16) % 10, share=1.0, last=True)
    assert learner.step.update(1)[1] > 2 * clip
    changes = [old - new.detach() for old, new in zip(before, learner.plain.parameters(), strict=True)]
    assert float(torch.cat([change.flatten() for change in changes]).norm()) == pytest.approx(0.25 * clip, rel=1e-2)


def test_processes_exchange_gradients_in_the_last_batch_alone(digits: ImageData, tmp_path: Path) -> None:
    apart: list[bool] = []
    add_gradient = Learner.add_gradient

    def noted(self: Learner, *batch: Tensor, share: float, last: bool) -> None:
        apart.append(False)
        add_gradient(self, *batch, share=share, last=last)

    def no_sync(self: Accelerator, model: nn.Module) -> Any:
        apart[-1] = True
        return contextlib.nullcontext()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "add_gradient", noted)
        patch.setattr(Accelerator, "no_sync", no_sync)
        config = replace(TINY, epochs=1, warmup_epochs=0, grad_accum_steps=3, output=str(tmp_path))
        train(config, digits, progress=False)
    assert apart == [step % 3 != 2 and step != 19 for step in range(20)]


def test_vectors_have_no_weight_decay_in_training_either(digits: ImageData) -> None:
    learner = learner_of(digits, weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in learner.optimizer.param_groups for p in group["params"]}
    for parameter in learner.plain.parameters():
        assert decay[id(parameter)] == (0.3 if parameter.ndim > 1 else 0)


def test_regularization_is_on_while_an_epoch_trains(digits: ImageData, tmp_path: Path) -> None:
    """Also in the epochs after the first test."""
    learner = learner_of(digits, drop_path=0.3, drop=0.2)
    rates = [module.drop_prob for module in learner.plain.modules() if isinstance(module, DropPath)]
    assert rates
    assert set(rates) == {0.3}
    modes = []
    add_gradient = Learner.add_gradient

    def noted(self: Learner, images: Tensor, targets: Tensor, *, share: float, last: bool) -> None:
        modes.append({module.training for module in self.plain.modules()})
        add_gradient(self, images, targets, share=share, last=last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "add_gradient", noted)
        train(replace(TINY, epochs=2, output=str(tmp_path)), digits, progress=False)
    assert len(modes) == 40
    assert all(mode == {True} for mode in modes)


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.5, True)])
def test_average_has_the_settings(digits: ImageData, decay: float, warmup: bool) -> None:
    ema = learner_of(digits, model_ema=True, model_ema_decay=decay, model_ema_warmup=warmup).ema
    assert ema is not None
    assert (ema.decay, ema.use_warmup) == (decay, warmup)
    assert learner_of(digits).ema is None


def test_average_is_what_is_tested_and_numbered_by_the_update(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[nn.Module] = []
    numbers: list[int] = []
    update = TrainingStep.update

    def noted(model: nn.Module, *rest: Any) -> evaluation.Evaluation:
        tested.append(model)
        for module in model.modules():
            if isinstance(vector := getattr(module, "u", None), Tensor):
                assert vector.norm() == pytest.approx(1, rel=1e-5)  # of an average it is not
        return evaluation.evaluate(model, *rest)

    def numbered(self: Any, number: int, notes: Any = ()) -> Tensor:
        numbers.append(number)
        return update(self, number, notes)

    monkeypatch.setattr(loop, "evaluate", noted)
    monkeypatch.setattr(TrainingStep, "update", numbered)
    config = replace(TINY, epochs=2, model_ema=True, model_ema_decay=0.9, output=str(tmp_path))
    result = train(config, digits, progress=False)
    assert numbers == list(range(1, 41))
    assert [model is result.model for model in tested] == [True, False, True, False]
    assert [row.ema_top1 is not None for row in result.metrics] == [True, True]


@pytest.mark.parametrize("group", [1, 3, 7, 25])
def test_shares_of_an_update_add_up_to_one(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    """Of the last one in an epoch of 20 batches too, which has fewer."""
    given: list[tuple[float, bool]] = []
    add_gradient = Learner.add_gradient

    def noted(self: Learner, *batch: Tensor, share: float, last: bool) -> None:
        given.append((share, last))
        add_gradient(self, *batch, share=share, last=last)

    monkeypatch.setattr(Learner, "add_gradient", noted)
    train(
        replace(TINY, epochs=1, warmup_epochs=0, grad_accum_steps=group, output=str(tmp_path)), digits, progress=False
    )
    assert len(given) == 20
    updates: list[list[float]] = [[]]
    for share, last in given:
        updates[-1].append(share)
        if last:
            updates.append([])
    assert updates.pop() == []
    assert [len(shares) for shares in updates] == [min(group, 20 - first) for first in range(0, 20, group)]
    assert all(len(set(shares)) == 1 and math.fsum(shares) == pytest.approx(1) for shares in updates)


def rates(config: TrainingConfig, peak: float, updates_per_epoch: int = 4) -> list[float]:
    """The rate of each update, asked for backwards: the schedule has no memory."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = Schedule(config, optimizer, lr=peak, updates_per_epoch=updates_per_epoch)
    found = []
    for update in reversed(range(schedule.num_epochs * updates_per_epoch)):
        schedule.move_to(update // updates_per_epoch, update)
        found.append(schedule.lr)
    return found[::-1]


def cosine(done: float, peak: float, low: float) -> float:
    return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2


def test_rate_of_each_epoch_is_that_of_the_paper() -> None:
    config = TrainingConfig(epochs=8, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01, cooldown_epochs=3)
    found = rates(config, 1.0)
    assert len(found) == 11 * 4
    assert found[::4] == found[3::4]  # the same in all of an epoch
    assert found[:12:4] == pytest.approx([0.1, 0.55, cosine(2 / 8, 1.0, 0.01)])
    assert found[8:32:4] == pytest.approx([cosine(epoch / 8, 1.0, 0.01) for epoch in range(2, 8)])
    assert found[32::4] == pytest.approx([0.01] * 3)


def test_rate_of_each_update() -> None:
    config = TrainingConfig(epochs=5, warmup_epochs=1, warmup_lr=0.2, min_lr=0.0, sched_on_updates=True)
    found = rates(config, 1.0)
    assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert found[4:] == pytest.approx([cosine(update / 20, 1.0, 0.0) for update in range(4, 20)])


def test_updates_take_the_rates_of_the_schedule(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []
    update = TrainingStep.update

    def noted(self: Any, number: int, notes: Any = ()) -> Tensor:
        taken.append(self.optimizer.param_groups[0]["lr"])
        return update(self, number, notes)

    monkeypatch.setattr(TrainingStep, "update", noted)
    config = replace(TINY, epochs=2, output=str(tmp_path))
    train(config, digits, progress=False)
    assert taken == rates(config, 1e-2, 20)


def test_rate_never_warms_up_from_above_or_falls_below_a_small_peak() -> None:
    config = TrainingConfig(epochs=4, warmup_epochs=1, warmup_lr=0.5, min_lr=0.5)
    assert rates(config, 0.1) == pytest.approx([0.1] * 16)


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]])
CLASSES = torch.tensor([0, 1])
SOFT = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])


def cross_entropy(targets: Tensor) -> float:
    return float(-(targets * LOGITS.log_softmax(1)).sum(1).mean())


def binary(targets: Tensor) -> float:
    return float(nn.functional.binary_cross_entropy_with_logits(LOGITS, targets))


ONE_HOT = nn.functional.one_hot(CLASSES, 3).float()


@pytest.mark.parametrize(
    ("changes", "targets", "expected"),
    [
        ({"smoothing": 0.0}, CLASSES, cross_entropy(ONE_HOT)),
        ({"smoothing": 0.3}, CLASSES, cross_entropy(0.7 * ONE_HOT + 0.1)),
        ({"smoothing": 0.3, "mixup": 1.0}, SOFT, cross_entropy(SOFT)),
        ({"smoothing": 0.0, "bce_loss": True}, CLASSES, binary(ONE_HOT)),
        ({"smoothing": 0.3, "bce_loss": True}, CLASSES, binary(0.7 * ONE_HOT + 0.1)),
        ({"smoothing": 0.3, "bce_loss": True, "cutmix": 1.0}, SOFT, binary(SOFT)),
        ({"mixup": 1.0, "bce_loss": True, "bce_target_thresh": 0.3}, SOFT, binary((SOFT > 0.3).float())),
    ],
)
def test_losses(changes: dict[str, Any], targets: Tensor, expected: float) -> None:
    assert float(make_loss(TrainingConfig(**changes))(LOGITS, targets)) == pytest.approx(expected, rel=1e-5)


def test_mixing_has_the_settings() -> None:
    assert make_mixup(TrainingConfig(), 3) is None
    config = TrainingConfig(
        mixup=0.3, cutmix=0.6, mixup_prob=0.7, mixup_switch_prob=0.2, smoothing=0.3, mixup_mode="elem"
    )
    mixup = make_mixup(config, 3)
    assert mixup is not None
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.3, 0.6, 0.7, 0.2)
    assert (mixup.label_smoothing, mixup.num_classes, mixup.mode) == (0.3, 3, "elem")
    ranged = make_mixup(TrainingConfig(cutmix_minmax=(0.2, 0.8)), 3)
    assert ranged is not None
    assert ranged.cutmix_minmax == (0.2, 0.8)


def test_mixing_ends_when_it_should(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soft: list[int] = []
    add_gradient = Learner.add_gradient

    def noted(self: Learner, images: Tensor, targets: Tensor, *, share: float, last: bool) -> None:
        soft.append(int((targets > 0).sum(1).max()))
        add_gradient(self, images, targets, share=share, last=last)

    monkeypatch.setattr(Learner, "add_gradient", noted)
    config = replace(TINY, epochs=2, mixup=1.0, mixup_off_epoch=1, smoothing=0.0, output=str(tmp_path))
    train(config, digits, progress=False)
    assert max(soft[:20]) == 2
    assert set(soft[20:]) == {1}


def test_random_numbers_of_a_step_depend_on_its_place_in_the_run_alone() -> None:
    """On seed, epoch, step and process: two processes draw other dropout masks."""

    def drawn(*place: int) -> tuple[float, ...]:
        seed_step(*place)
        return tuple(torch.rand(4).tolist())

    places = list(itertools.product((0, 1), repeat=4))
    found = {drawn(*place): place for place in places}
    assert list(found.values()) == places
    assert all(found[drawn(*place)] == place for place in reversed(places))

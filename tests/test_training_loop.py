"""What a run does around its updates: late numbers, background files, rates for any number of GPUs, trackers, lines."""

from __future__ import annotations

import gc
import math
import os
import re
import signal
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_images import write_digit_tree
from hypothesis import given
from hypothesis import strategies as st
from training_runs import LIVELY, TINY, difference, saved

from imixer.data import ImageData, UnreadableImageError
from imixer.training import (
    PRESETS,
    NonFiniteError,
    TrainingConfig,
    TrainingInterruptedError,
    load_checkpoint,
    load_data,
    loop,
    reporting,
    resuming,
    train,
)
from imixer.training.background import BackgroundWriter
from imixer.training.checkpoints import save_checkpoint
from imixer.training.learner import Learner
from imixer.training.objective import seed_step
from imixer.training.schedule import Schedule

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(TINY)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: ImageData) -> Path:
    return train(replace(LIVELY, output=str(tmp_path_factory.mktemp("run"))), digits, progress=False).output


@pytest.fixture(params=[0, 1, 3])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Updates that are under way before the first one's loss is looked at; 0 on the CPU otherwise."""
    number: int = request.param
    monkeypatch.setattr(loop, "UPDATES_AHEAD", {"cpu": number})
    return number


def test_results_are_the_same_however_late_they_are_read(
    undisturbed: Path, digits: ImageData, tmp_path: Path, ahead: int
) -> None:
    train(replace(LIVELY, output=str(tmp_path)), digits, progress=False)
    for name in ("last.pt", "previous.pt", "best.pt"):
        assert difference(saved(tmp_path / name), saved(undisturbed / name)) == []


@pytest.mark.parametrize("place", [(0, 4), (0, 26)])
def test_stop_is_late_by_that_many_updates_and_loses_nothing(
    undisturbed: Path,
    digits: ImageData,
    tmp_path: Path,
    ahead: int,
    place: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def signalled(seed: int, epoch: int, step: int, rank: int) -> None:
        if (epoch, step) == place:
            os.kill(os.getpid(), signal.SIGTERM)
        seed_step(seed, epoch, step, rank)

    config = replace(LIVELY, output=str(tmp_path))
    step = min(3 * (place[1] // 3 + 1 + ahead), 27)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "seed_step", signalled)
        with pytest.raises(TrainingInterruptedError, match=f"stopped in epoch 1 after step {step} of 27, saved"):
            train(config, digits, progress=False)
    assert load_checkpoint(tmp_path)[0]["progress"]["updates"] == step / 3
    train(config, digits, resume=tmp_path, progress=False)
    assert difference(saved(tmp_path / "last.pt"), saved(undisturbed / "last.pt")) == []


def test_updates_left_out_are_counted_however_late(
    digits: ImageData, tmp_path: Path, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_gradient = Learner.add_gradient
    calls = [0]

    def spoiled(self: Learner, *batch: Any, share: float, last: bool) -> None:
        calls[0] += 1
        add_gradient(self, *batch, share=math.nan if calls[0] in (3, 4, 30) else share, last=last)

    monkeypatch.setattr(Learner, "add_gradient", spoiled)
    config = replace(TINY, epochs=2, max_nonfinite=3, norm="batch", model_ema=True, output=str(tmp_path / "run"))
    result = train(config, digits, progress=False)
    assert [row.nonfinite for row in result.metrics] == [2, 1]
    state = load_checkpoint(tmp_path / "run")[0]
    for weights in (state["state_dict"], state["state_dict_ema"]):
        assert all(tensor.isfinite().all() for tensor in weights.values())
    calls[0] = 0
    with pytest.raises(NonFiniteError, match="2 updates in a row.*; the last in epoch 1, step 4 of 20: loss nan"):
        train(replace(config, max_nonfinite=2, output=str(tmp_path / "stopped")), digits, progress=False)
    assert load_checkpoint(tmp_path / "stopped")[0]["progress"]["updates"] == 4 + ahead


def test_a_checkpoint_is_of_one_moment(
    undisturbed: Path, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written while updates go on, and holds what was there before them."""
    written = threading.Event()
    stepped = []
    move_to = Schedule.move_to

    def slow(folder: Path, state: dict[str, Any], *, best: bool = False) -> None:
        if state["progress"]["updates"] == 9:
            assert written.wait(timeout=60)
        save_checkpoint(folder, state, best=best)

    def moved(self: Any, epoch: int, updates: int) -> None:
        stepped.append(updates)
        if updates == 12:
            written.set()
        move_to(self, epoch, updates)

    monkeypatch.setattr(loop, "save_checkpoint", slow)
    monkeypatch.setattr(Schedule, "move_to", moved)
    train(replace(LIVELY, output=str(tmp_path)), digits, progress=False)
    for name in ("previous.pt", "last.pt", "best.pt"):
        assert difference(saved(tmp_path / name), saved(undisturbed / name)) == []
    assert saved(tmp_path / "previous.pt")["progress"]["updates"] == 9


def test_checkpoint_that_a_run_goes_on_from_does_not_stay_in_memory(
    undisturbed: Path, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[weakref.ref[torch.Tensor]] = []

    def noting(*arguments: Any) -> Any:
        checkpoint, source = load_checkpoint(*arguments)
        names = ("head.weight", "head.bias")
        read.extend(weakref.ref(checkpoint[part][name]) for part in ("state_dict", "state_dict_ema") for name in names)
        return checkpoint, source

    def stepping(*place: int) -> None:
        gc.collect()
        raise KeyboardInterrupt(f"{sum(tensor() is not None for tensor in read)} of {len(read)} are there")

    monkeypatch.setattr(resuming, "load_checkpoint", noting)
    monkeypatch.setattr(loop, "seed_step", stepping)
    with pytest.raises(KeyboardInterrupt, match="0 of 4 are there"):
        train(replace(LIVELY, epochs=3, output=str(tmp_path)), digits, resume=undisturbed, progress=False)


def test_what_cannot_be_written_in_the_background_is_an_error() -> None:
    def fail() -> None:
        raise OSError("the disk is full")

    def late() -> None:
        written.append(1)

    written: list[int] = []
    with BackgroundWriter() as writer:
        writer.start(fail)
        with pytest.raises(OSError, match="the disk is full"):
            writer.start(late)
        writer.start(late)
    assert written == [1]
    with pytest.raises(OSError, match="the disk is full"), BackgroundWriter() as writer:
        writer.start(fail)
    writer = BackgroundWriter()
    writer.start(fail)
    error = ValueError("what ended the run")
    writer.__exit__(ValueError, error, None)
    assert error.__notes__ == ["besides, the disk is full"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_that_cannot_be_read_saves_first(tmp_path: Path, split: str) -> None:
    write_digit_tree(tmp_path / "shapes")
    config = replace(
        TINY, data_dir=str(tmp_path / "shapes"), cache_mb=0, workers=0, epochs=2, batch_size=8, img_size=8, patch_size=2
    )
    config = replace(config, norm="batch", grad_accum_steps=4, log_with=("none",))
    whole = train(replace(config, output=str(tmp_path / "whole")), load_data(config), progress=False)
    data = load_data(config)
    broken = sorted((tmp_path / "shapes" / split / "1").iterdir())[3]
    content = broken.read_bytes()
    broken.write_bytes(content[:60] + bytes(len(content) - 60))
    folder = tmp_path / "run"
    place = r"epoch 1 after step \d+ of 9" if split == "train" else "epoch 1 after step 9 of 9"
    message = (
        rf"cannot read image .*{broken.name}.*; saved .*last.pt in {place}: when this is mended, --resume .*run goes"
    )
    with pytest.raises(UnreadableImageError, match=message):
        train(replace(config, output=str(folder)), data, progress=False)
    broken.write_bytes(content)
    result = train(replace(config, output=str(folder)), load_data(config), resume=folder, progress=False)
    assert difference(result.model.state_dict(), whole.model.state_dict()) == []


@pytest.mark.parametrize(
    ("changes", "images", "rate"),
    [
        ({"lr": 0.5, "lr_base": 1.0}, 7, 0.5),
        ({"lr_base": 0.1, "lr_base_size": 256, "lr_base_scale": "linear"}, 512, 0.2),
        ({"lr_base": 0.1, "lr_base_size": 256, "lr_base_scale": "sqrt"}, 1024, 0.2),
        ({"lr_base": 0.1, "lr_base_size": 256, "opt": "sgd"}, 1024, 0.4),
        ({"lr_base": 0.1, "lr_base_size": 256, "opt": "lamb"}, 1024, 0.2),
        ({"lr_base": 0.1, "lr_base_size": 256, "opt": "adamw"}, 64, 0.05),
        (PRESETS["paper-small"], 512, 5e-4),
        (PRESETS["paper-small"], 2048, 2e-3),
        (PRESETS["paper-base"], 256, 2.5e-4),
        (PRESETS["paper-large"], 64, 6.25e-5),
        (PRESETS["digits"], 64, 3e-3),
    ],
)
def test_rate_grows_with_the_images_per_update(changes: dict[str, Any], images: int, rate: float) -> None:
    assert TrainingConfig(**changes).peak_lr(images) == pytest.approx(rate)


@given(world_size=st.integers(1, 64), batch=st.integers(1, 64), steps=st.integers(1, 16), slack=st.integers(0, 3))
def test_global_batch_is_kept_on_any_number_of_processes(world_size: int, batch: int, steps: int, slack: int) -> None:
    config = TrainingConfig(global_batch=world_size * batch * steps, batch_size=batch + slack)
    if batch * steps % -(-batch * steps // config.batch_size):
        with pytest.raises(ValueError, match="cannot be cut into batches of") as error:
            config.batches(world_size)
        (near,) = re.findall(r"--batch-size one of ([\d, ]+),", str(error.value))
        for size in near.split(", "):
            config = replace(config, batch_size=int(size))
            assert config.batches(world_size) == (int(size), batch * steps / int(size))
        return
    found, group = config.batches(world_size)
    assert found * group * world_size == config.global_batch
    assert found <= config.batch_size
    assert group == -(-batch * steps // config.batch_size)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("preset", ["paper-small", "paper-base", "paper-large"])
def test_presets_of_the_paper_fit_any_usual_number_of_gpus(preset: str, world_size: int) -> None:
    config = TrainingConfig(**PRESETS[preset])
    batch, group = config.batches(world_size)
    assert (batch * group * world_size, group) == (config.global_batch, 1)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        (
            {"global_batch": 512},
            3,
            "global_batch 512 is not a multiple of the 3 processes; choose --global-batch 510 or",
        ),
        ({"global_batch": 2}, 4, "is not a multiple of the 4 processes; choose --global-batch 4$"),
        (
            {"global_batch": 96, "batch_size": 10, "grad_accum_steps": 7},
            2,
            "48 images per update, .* cut into 7 batches",
        ),
        (
            {"global_batch": 96, "batch_size": 10, "grad_accum_steps": 4},
            2,
            "batches of at most 10 images. Give --batch-",
        ),
        ({"global_batch": 62, "batch_size": 32, "mixup": 1.0}, 2, "equal even batches .* one of nothing"),
    ],
)
def test_bad_global_batch_says_what_to_choose(changes: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes).batches(world_size)


def test_run_says_its_images_per_update_and_rate(
    digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(TINY, lr=None, global_batch=128, batch_size=48, epochs=1, warmup_epochs=0)
    with pytest.raises(ValueError, match="one of 4, 8, 16, 32, 64, 128"):
        train(config, digits, progress=False)
    result = train(replace(config, batch_size=32, output=str(tmp_path)), digits)
    out = capsys.readouterr().out
    assert "32 x 1 x 4 = 128 images to an update, 1 epochs; learning rate 0.00424 (0.003 at 64 images, sqrt)" in out
    peak, last = 3e-3 * math.sqrt(2), 9 / 10
    assert result.metrics[0].lr == pytest.approx(1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * last)) / 2)
    assert load_checkpoint(tmp_path)[0]["progress"]["updates"] == 10


def test_lines_begin_with_the_time_where_there_is_no_terminal(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reporting, "LINE_SECONDS", 0.0)
    train(replace(TINY, epochs=1, output=str(tmp_path / "piped")), digits)
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line for line in out.splitlines() if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)]
    assert len(lines) == 3 + 20  # the data, the model, the epoch and every update
    assert re.search(r" 64 of 1,280 images  epoch 1  loss \d\.\d{3}  lr \S+  memory \d", lines[2])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(replace(TINY, epochs=1, output=str(tmp_path / "terminal")), digits)
    out, err = capsys.readouterr()
    assert "images/s" in err
    assert "\nepoch   1/1  train loss" in out
    train(replace(TINY, epochs=1, output=str(tmp_path / "quiet")), digits, progress=False)
    assert capsys.readouterr() == ("", "")


def test_one_model_is_kept_for_the_report(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[torch.nn.Module] = []

    def look(model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor) -> list[dict[str, Any]]:
        looked.append(model)
        return []

    monkeypatch.setattr(loop, "look_at_imlps", look)
    config = replace(TINY, epochs=3, report_interval=1, amp=True, output=str(tmp_path))
    result = train(config, digits, progress=False)
    assert len(looked) == 3
    assert len(set(map(id, looked))) == 1
    assert looked[0] is not result.model
    assert difference(looked[0].state_dict(), result.model.state_dict()) == []


def test_weights_that_are_not_finite_end_the_run(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which updates of finite gradients can make them, as by Adam with an epsilon of 0."""
    end_epoch = Learner.end_epoch

    def spoiling(self: Learner) -> None:
        end_epoch(self)
        if (tmp_path / "last.pt").exists():
            next(self.plain.parameters()).data.view(-1)[0] = math.inf

    monkeypatch.setattr(Learner, "end_epoch", spoiling)
    with pytest.raises(NonFiniteError, match=r"after epoch 2 1 weights are not finite, among them stem.proj.weight"):
        train(replace(TINY, output=str(tmp_path)), digits, progress=False)
    assert load_checkpoint(tmp_path)[0]["epoch"] == 1

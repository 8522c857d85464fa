"""Nothing is lost: runs that are stopped, killed, or cannot write go on to the very weights of an undisturbed one."""

from __future__ import annotations

import copy
import math
import os
import resource
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import LIVELY, TINY, difference, read_curves, saved

from imixer.data import ImageData
from imixer.training import (
    CheckpointError,
    NonFiniteError,
    TrainingConfig,
    TrainingInterruptedError,
    checkpoints,
    load_checkpoint,
    load_data,
    loop,
    train,
)
from imixer.training.distributed import make_accelerator
from imixer.training.learner import Learner
from imixer.training.objective import seed_step

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the processes that are killed: bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(TINY)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: ImageData) -> Path:
    return train(replace(LIVELY, output=str(tmp_path_factory.mktemp("run"))), digits, progress=False).output


def stop_at(monkeypatch: pytest.MonkeyPatch, places: set[tuple[int, int]], number: int = signal.SIGTERM) -> None:
    """Send this process a signal when a run comes to these epochs and steps, once each."""

    def signalled(seed: int, epoch: int, step: int, rank: int) -> None:
        if (epoch, step) in places:
            places.discard((epoch, step))
            os.kill(os.getpid(), number)
        seed_step(seed, epoch, step, rank)

    monkeypatch.setattr("imixer.training.loop.seed_step", signalled)


def test_stopped_run_goes_on_bit_by_bit(
    undisturbed: Path, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, {(0, 4), (0, 26), (1, 0)})  # within an epoch, at its end, at its beginning
    config = replace(LIVELY, output=str(tmp_path))
    for number, place in enumerate(["epoch 1 after step 6", "epoch 1 after step 27", "epoch 2 after step 3"]):
        resume = tmp_path if number else None
        with pytest.raises(TrainingInterruptedError) as stopped:
            train(config, digits, resume=resume, progress=False)
        assert str(stopped.value) == (
            f"stopped in {place} of 27, saved {tmp_path}/last.pt; continue with --resume {tmp_path}"
        )
        assert stopped.value.signal_number == signal.SIGTERM
    train(config, digits, resume=tmp_path, progress=False)
    for name in ("last.pt", "best.pt"):
        assert difference(saved(tmp_path / name), saved(undisturbed / name)) == []
    clock = ("seconds", "images_per_second")
    rows = [
        [{k: v for k, v in row.items() if k not in clock} for row in read_curves(f)] for f in (tmp_path, undisturbed)
    ]
    assert rows[0] == rows[1]


def test_the_state_that_is_compared_is_alive(undisturbed: Path) -> None:
    """What a resumed run could lose is there: averages apart from the weights, moments, singular vectors."""
    state = saved(undisturbed / "last.pt")
    name = "blocks.0.mlp_tokens.fc_sn1.parametrizations.weight"
    assert not torch.equal(state["state_dict"][f"{name}.original"], state["state_dict_ema"][f"{name}.original"])
    assert state["optimizer"]["state"][f"{name}.original"]["exp_avg"].abs().max() > 0
    assert state["optimizer"]["state"][f"{name}.original"]["step"] == 18
    for weights in (state["state_dict"], state["state_dict_ema"]):
        assert weights[f"{name}.0.u"].norm() == pytest.approx(1, rel=1e-5)  # also of the averaged weights


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_every_signal_that_stops_a_run_saves_it(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # what was started in the background may ignore SIGINT
    try:
        stop_at(monkeypatch, {(0, 1)}, number)
        with pytest.raises(TrainingInterruptedError) as stopped:
            train(replace(LIVELY, output=str(tmp_path)), digits, progress=False)
        assert stopped.value.signal_number == number
        assert load_checkpoint(tmp_path)[0]["progress"]["step"] == 3
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_hang_up_that_is_ignored_stays_ignored(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_at(monkeypatch, {(0, 1)}, signal.SIGHUP)
        assert len(train(replace(LIVELY, output=str(tmp_path)), digits, progress=False).metrics) == 2
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("interval", "updates"), [("4", [4, 8, 9, 13, 17, 18]), ("0.000001s", [*range(1, 19)])])
def test_checkpoints_within_an_epoch(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: str, updates: list[int]
) -> None:
    found = []
    save = checkpoints.save_checkpoint

    def noting(folder: Path, checkpoint: dict[str, Any], *, best: bool) -> None:
        found.append(checkpoint["progress"]["updates"])
        save(folder, checkpoint, best=best)

    monkeypatch.setattr(loop, "save_checkpoint", noting)
    train(replace(LIVELY, output=str(tmp_path), checkpoint_interval=interval), digits, progress=False)
    assert sorted(set(found)) == updates


def test_run_goes_on_from_the_checkpoint_before(
    undisturbed: Path, digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    with (tmp_path / "last.pt").open("r+b") as file:
        file.truncate(5000)
    train(replace(LIVELY, output=str(tmp_path)), digits, resume=tmp_path)
    message = "last.pt (5,000 bytes) is damaged or no checkpoint: "
    assert message in (out := capsys.readouterr().out)
    assert f"; continuing from {tmp_path}/previous.pt instead" in out
    assert difference(saved(tmp_path / "last.pt"), saved(undisturbed / "last.pt")) == []
    assert checkpoints.read_checkpoint(tmp_path / "previous.pt")["epoch"] == 1  # not the damaged one
    assert (tmp_path / "refused.pt").stat().st_size == 5000


@pytest.mark.parametrize("name", ["best.pt", "previous.pt"])
def test_named_checkpoint_goes_on_in_a_folder_of_its_own(
    undisturbed: Path, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One state of a run, the second epoch of which is done otherwise; nothing of the run is changed or renamed."""
    monkeypatch.chdir(tmp_path)
    run = Path("runs/digits-imixer_ti4_32")
    run.mkdir(parents=True)
    for written, original in (("last.pt", "last.pt"), ("previous.pt", "previous.pt"), ("best.pt", "previous.pt")):
        (run / written).write_bytes((undisturbed / original).read_bytes())
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ValueError, match=r"imixer_ti4_32 holds a run; continue it with --resume .*ti4_32, or choose"):
        train(replace(LIVELY, output=str(run)), digits, resume=run / name, progress=False)
    result = train(LIVELY, digits, resume=run / name)
    assert result.output == Path("runs/digits-imixer_ti4_32-2")
    assert difference(saved(result.output / "last.pt"), saved(undisturbed / "last.pt")) == []
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    (run / name).write_bytes(before[name][:-1])
    with pytest.raises(CheckpointError, match=rf"{name} .* is damaged: the digest at its end is missing"):
        train(LIVELY, digits, resume=run / name, progress=False)


def test_best_checkpoint_is_that_of_the_best_epoch(digits: ImageData, tmp_path: Path) -> None:
    """Also of a run that was stopped after it, and whose later epochs are worse."""
    result = train(replace(TINY, epochs=2, output=str(tmp_path)), digits, progress=False)
    train(replace(TINY, epochs=4, lr=0.3, output=str(tmp_path)), digits, resume=tmp_path, progress=False)
    rows = read_curves(tmp_path)
    best = max(range(4), key=lambda index: float(rows[index]["test_top1"]))
    checkpoint = checkpoints.read_checkpoint(tmp_path / "best.pt")
    assert checkpoint["epoch"] == best + 1
    assert len(checkpoint["progress"]["metrics"]) == best + 1
    assert best < 3, "the test shows nothing"
    assert len(result.metrics) == 2


def test_other_images_are_refused_unless_they_are_allowed(
    undisturbed: Path, digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy.deepcopy(digits)
    other.train.targets[7] = (other.train.targets[7] + 1) % 10  # type: ignore[attr-defined]
    config = replace(LIVELY, epochs=3, output=str(tmp_path))
    message = r"last\.pt is of a run on other images \(train_content \w{32} -> \w{32}\); give it the same ones, or"
    with pytest.raises(CheckpointError, match=message):
        train(config, other, resume=undisturbed, progress=False)
    assert not any(tmp_path.glob("*.pt"))
    train(config, other, resume=undisturbed, allow_other_data=True)
    assert "the images are others than before: train_content" in capsys.readouterr().out
    train(replace(config, epochs=4), other, resume=tmp_path)  # which is of these images now
    assert "others than before" not in capsys.readouterr().out


def test_other_versions_and_threads_are_named(
    undisturbed: Path, digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    checkpoint = checkpoints.read_checkpoint(tmp_path / "last.pt")
    here = checkpoint["environment"]["versions"]
    assert {"python", "torch", "torchvision", "timm", "numpy", "pillow"} <= here.keys()
    checkpoint["environment"]["versions"] = {**here, "torch": "1.0", "pillow": "2.0"}
    checkpoint["environment"]["threads"] = 64
    checkpoints.save_checkpoint(tmp_path, checkpoint)
    train(LIVELY, digits, resume=tmp_path)
    message = (
        f"results may differ in the last bits: torch 1.0 -> {torch.__version__}, pillow 2.0 -> {here['pillow']}, "
        "threads 64 -> 1\n"
    )
    assert message in capsys.readouterr().out
    train(LIVELY, digits, resume=undisturbed)
    assert "last bits" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("state_dict", {"head.weight": torch.zeros(1)}, "the weights of the checkpoint cannot be used: Error"),
        ("state_dict_ema", {1: 2}, "the averaged weights of the checkpoint cannot be used: "),
        ("optimizer", {"state": {}, "param_groups": [{}]}, "the optimizer of the checkpoint cannot be used: "),
        ("optimizer", {"nothing": 1}, "the optimizer of the checkpoint cannot be used: 'param_groups'"),
        ("progress", {"epoch": 1}, "the progress of the checkpoint cannot be used: 'metrics'"),
        ("progress", {"epoch": "x", "metrics": []}, "the progress of the checkpoint cannot be used: epoch is 'x'"),
        ("progress", {"metrics": [{"lr": 1}]}, "the progress of the checkpoint cannot be used: .*missing"),
        ("environment", {"versions": 3}, None),
        ("data", 3, r"is of a run on other images \(classes None -> "),
        ("global_batch", "many", r"is of another run: global_batch many there, 48 here"),
    ],
)
def test_checkpoint_of_other_content_is_refused_in_one_line(
    undisturbed: Path, digits: ImageData, tmp_path: Path, part: str, value: Any, message: str | None
) -> None:
    checkpoint = checkpoints.read_checkpoint(undisturbed / "last.pt")
    checkpoints.save_checkpoint(tmp_path, {**checkpoint, part: value})
    if message is None:
        train(LIVELY, digits, resume=tmp_path, progress=False)
        return
    with pytest.raises(CheckpointError, match=message) as error:
        train(LIVELY, digits, resume=tmp_path, progress=False)
    assert "\n" not in str(error.value)
    assert checkpoints.read_checkpoint(tmp_path / "last.pt")["epoch"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h_ratio": 1.0}, r"last\.pt is of another run: model_args .* there, .*h_ratio=1\.0.* here"),
        ({"model": "imixer_s4_32"}, r"is of another run: model imixer_ti4_32 there, imixer_s4_32 here"),
        (
            {"batch_size": 32},
            r"with 3 x 48 images to an update, .*, which here would be 3 x 32; .* give --batch-size 48$",
        ),
        (
            {"grad_accum_steps": 1},
            r"of a run with 3 x 48 .* would be 1 x 48; .* 1 process, give --batch-size 48 --grad-accum-steps 3$",
        ),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    undisturbed: Path, digits: ImageData, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        train(replace(LIVELY, **changes), digits, resume=undisturbed, progress=False)


def test_settings_may_change_on_the_way(
    undisturbed: Path, digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(LIVELY, epochs=3, output=str(tmp_path / "longer"))
    result = train(config, digits, resume=undisturbed / "last.pt")
    assert "continuing after epoch 2, step 0 of 27, with epochs 2 -> 3" in capsys.readouterr().out
    assert [row.epoch for row in result.metrics] == [1, 2, 3]
    assert result.output == tmp_path / "longer"
    assert load_checkpoint(undisturbed)[0]["epoch"] == 2


def test_full_disk_leaves_the_checkpoints_that_were_there(
    undisturbed: Path, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(LIVELY, output=str(tmp_path), checkpoint_interval="4")
    save = checkpoints.save_checkpoint
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_full_disk(folder: Path, checkpoint: dict[str, Any], *, best: bool) -> None:
        full = checkpoint["progress"]["updates"] == 13
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if full else limits[0], limits[1]))
        save(folder, checkpoint, best=best)

    monkeypatch.setattr(loop, "save_checkpoint", on_full_disk)
    try:
        with pytest.raises(OSError, match=r"cannot save a checkpoint .*File too large; last.pt, previous.pt of before"):
            train(config, digits, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(tmp_path)[0]["progress"]["updates"] == 9
    assert not list(tmp_path.glob(".*.tmp"))
    monkeypatch.undo()
    train(config, digits, resume=tmp_path, progress=False)
    assert difference(saved(tmp_path / "last.pt"), saved(undisturbed / "last.pt")) == []


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, updates: set[int]) -> None:
    """Multiply the loss by nan in some updates."""
    add_gradient = Learner.add_gradient
    done = [0]

    def spoiled(self: Learner, images: Tensor, targets: Tensor, *, share: float, last: bool) -> None:
        add_gradient(self, images, targets, share=math.nan if done[0] + 1 in updates else share, last=last)
        done[0] += last

    monkeypatch.setattr(Learner, "add_gradient", spoiled)


def test_updates_that_are_not_finite_are_left_out_and_counted(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_gradients(monkeypatch, {3, 4, 30})
    result = train(replace(TINY, epochs=2, max_nonfinite=3, output=str(tmp_path)), digits)
    assert [row.nonfinite for row in result.metrics] == [2, 1]
    assert result.metrics[1].train_loss < result.metrics[0].train_loss
    assert all(parameter.isfinite().all() for parameter in result.model.parameters())
    out = capsys.readouterr().out
    assert "epoch 1, step 4 of 20: loss nan, gradient norm nan, learning rate" in out
    assert "not finite, update left out (2 in a row)" in out
    assert "2 updates not finite" in out


def test_too_many_of_them_stop_the_run(digits: ImageData, tmp_path: Path) -> None:
    config = replace(TINY, lr=1e30, clip_grad=None, warmup_epochs=0, max_nonfinite=5, output=str(tmp_path))
    pattern = (
        r"not finite in 5 updates in a row, which were left out; the last in epoch 1, step \d+ of 20: loss (nan|inf), "
        r"gradient norm (nan|inf), learning rate \S+e\+(29|30). Try a smaller --lr"
    )
    with pytest.raises(NonFiniteError, match=pattern):
        train(config, digits, progress=False)
    assert load_checkpoint(tmp_path)[0]["progress"]["nonfinite_in_row"] == 5


def test_finished_run_stays_as_it_is(undisturbed: Path, digits: ImageData) -> None:
    before = saved(undisturbed / "last.pt")
    result = train(LIVELY, digits, resume=undisturbed, progress=False)
    assert [row.epoch for row in result.metrics] == [1, 2]
    assert difference(saved(undisturbed / "last.pt"), before) == []


def test_scale_of_the_gradients_is_saved_and_restored(digits: ImageData) -> None:
    """Of float16 on a GPU; the same class works on the CPU."""
    accelerator = make_accelerator(TINY)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    state = Learner(TINY, digits, accelerator, lr=1e-2).state()
    assert state["scaler"]["scale"] == 8
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    Learner(TINY, digits, accelerator, state, lr=1e-2)
    assert accelerator.scaler.get_scale() == 8


def test_time_goes_on_where_it_was(undisturbed: Path, digits: ImageData, tmp_path: Path) -> None:
    checkpoint = checkpoints.read_checkpoint(undisturbed / "previous.pt")
    checkpoint["progress"]["seconds"] = 1000.0
    checkpoints.save_checkpoint(tmp_path, checkpoint)
    assert (
        train(replace(LIVELY, output=str(tmp_path)), digits, resume=tmp_path, progress=False).metrics[1].seconds > 1000
    )


def test_settings_of_a_run_are_those_it_began_with(undisturbed: Path) -> None:
    from imixer.training import parse

    command = parse(["--resume", str(undisturbed), "--epochs", "7"])
    config = command.config(load_checkpoint(undisturbed)[0]["config"])
    assert config == replace(LIVELY, epochs=7)
    assert isinstance(config, TrainingConfig)

"""Training: files, curves, seeds, and the errors that stop a run."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import nn

from imixer import training
from imixer.data import ImageData, make_loader
from imixer.run_folder import RUN_FILES, prepare_output, write_atomically
from imixer.training import NonFiniteLossError, TrainingResult, build_model, evaluate, load_data, train
from imixer.training_config import TrainingConfig

TINY = TrainingConfig(num_blocks=1, embed_dim=16, epochs=3, lr=1e-2, device="cpu")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Let each test choose its own precision: Accelerate keeps the first one for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(TINY)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: ImageData) -> TrainingResult:
    config = replace(TINY, output=str(tmp_path_factory.mktemp("run") / "new" / "folder"))
    return train(config, digits, progress=False)


def read_curves(output: Path) -> list[dict[str, str]]:
    with (output / "curves.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_run_leaves_its_files(run: TrainingResult) -> None:
    assert sorted(path.name for path in run.output.iterdir()) == sorted(RUN_FILES)
    with Image.open(run.output / "curves.png") as plot:
        assert plot.format == "PNG"
        assert plot.width >= 1000


def test_loss_falls_and_every_epoch_is_a_row(run: TrainingResult) -> None:
    rows = read_curves(run.output)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for column in ("train_loss", "test_loss"):
        values = [float(row[column]) for row in rows]
        assert values == sorted(values, reverse=True)
    assert float(rows[-1]["test_top1"]) > 30
    assert float(rows[-1]["test_top1"]) == run.metrics[-1].test_top1


def test_checkpoint_rebuilds_the_model(run: TrainingResult, digits: ImageData) -> None:
    path = run.output / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    model = timm.create_model(checkpoint["model"], checkpoint_path=path, **checkpoint["model_args"])
    loader = make_loader(digits.test, batch_size=100, training=False, workers=0, seed=0)
    loss, top1 = evaluate(model, loader)
    assert top1 == run.metrics[-1].test_top1
    assert loss == pytest.approx(run.metrics[-1].test_loss, rel=1e-5)
    assert checkpoint["epoch"] == 3
    assert checkpoint["classes"] == list("0123456789")
    assert (checkpoint["mean"], checkpoint["std"]) == (list(digits.mean), list(digits.std))
    assert checkpoint["versions"]["torch"] == torch.__version__


def test_evaluate_counts_all_images(digits: ImageData) -> None:
    model = build_model(TINY, digits)
    images, targets = next(iter(make_loader(digits.test, batch_size=500, training=False, workers=0, seed=0)))
    with torch.no_grad():
        logits = model.eval()(images)
    loss, top1 = evaluate(model, make_loader(digits.test, batch_size=64, training=False, workers=0, seed=0))
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    assert top1 == pytest.approx(100 * (logits.argmax(1) == targets).float().mean().item(), rel=1e-5)


def test_same_seed_same_curve(run: TrainingResult, digits: ImageData, tmp_path: Path) -> None:
    def curve(seed: int) -> list[tuple[float, float]]:
        result = train(replace(TINY, seed=seed, output=str(tmp_path / str(seed))), digits, progress=False)
        return [(row.train_loss, row.test_loss) for row in result.metrics]

    first = [(row.train_loss, row.test_loss) for row in run.metrics]
    assert curve(0) == first
    assert curve(1) != first


def test_learning_rate_warms_up_and_falls(digits: ImageData, tmp_path: Path) -> None:
    config = replace(TINY, epochs=4, warmup_epochs=2, min_lr=1e-4, output=str(tmp_path))
    rates = [row.lr for row in train(config, digits, progress=False).metrics]
    assert rates[0] == pytest.approx(0.5 * 1e-2, rel=0.1)
    assert rates[1] == pytest.approx(1e-2, rel=0.1)
    assert rates[3] == pytest.approx(1e-4, abs=1e-4)


def test_bfloat16_trains(digits: ImageData, tmp_path: Path) -> None:
    result = train(replace(TINY, amp=True, output=str(tmp_path)), digits, progress=False)
    assert result.metrics[-1].train_loss < result.metrics[0].train_loss
    weights = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state_dict"]
    assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.float32}


def test_non_finite_loss_stops_the_run(digits: ImageData, tmp_path: Path) -> None:
    config = replace(TINY, lr=1e30, clip_grad=0.0, warmup_epochs=0, output=str(tmp_path))
    pattern = r"loss is (nan|inf) in epoch 1, step \d+ of 20, at learning rate \S+e\+(29|30); try a smaller --lr"
    with pytest.raises(NonFiniteLossError, match=pattern):
        train(config, digits, progress=False)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_interrupted_run_keeps_its_finished_epochs(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[nn.Module] = []

    def evaluate_twice(model: nn.Module, loader: object) -> tuple[float, float]:
        tested.append(model)
        if len(tested) == 3:
            raise KeyboardInterrupt
        return 1.0, 50.0

    monkeypatch.setattr(training, "evaluate", evaluate_twice)
    with pytest.raises(KeyboardInterrupt):
        train(replace(TINY, output=str(tmp_path)), digits, progress=False)
    assert len(read_curves(tmp_path)) == 2
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "config.json", "curves.csv"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "imixer_ti4_23"},
            r"unknown model 'imixer_ti4_23'; did you mean imixer_ti4_32.*imixer_s16_224",
        ),
        ({"model": "nothing like it"}, r"unknown model 'nothing like it'; the iMixers are imixer_"),
        (
            {"model": "resnet18"},
            r"cannot build resnet18 with num_classes=10, .*img_size=8.*unexpected keyword",
        ),
        ({"solver": "picrad"}, r"cannot build imixer_ti4_32 with .*solver='picrad'"),
    ],
)
def test_model_error_says_what_exists(digits: ImageData, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(replace(TINY, **changes), digits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"batch_size": -4}, "batch_size must be at least 1, not -4"),
        ({"lr": 0.0}, "lr must be positive and finite, not 0.0"),
        ({"smoothing": 1.0}, "smoothing must be at least 0 and below 1, not 1.0"),
        ({"clip_grad": -1.0}, "clip_grad must not be negative, but is -1.0"),
        ({"hflip": 2.0}, "hflip is a probability, from 0 to 1, not 2.0"),
        ({"epochs": 2, "warmup_epochs": 3}, "warmup_epochs counts as part of epochs, but is 3 of 2 epochs"),
        ({"opt": "adamm"}, "opt 'adamm' is unknown; known are .*adam"),
        ({"sched": "cosin"}, "sched 'cosin' is unknown; known are cosine"),
        ({"amp_dtype": "half"}, "amp_dtype 'half' is unknown; known are bfloat16, float16"),
        ({"device": "tpu"}, "device 'tpu' is unknown; known are auto, cpu, cuda"),
    ],
)
def test_config_error_says_what_came(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)  # type: ignore[arg-type]


def test_float16_on_the_cpu_is_refused(digits: ImageData) -> None:
    with pytest.raises(ValueError, match=r"float16 needs a CUDA device; .* bfloat16"):
        train(replace(TINY, amp=True, amp_dtype="float16"), digits, progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_missing_cuda_is_reported(digits: ImageData) -> None:
    with pytest.raises(ValueError, match="device cuda is not available here"):
        train(replace(TINY, device="cuda"), digits, progress=False)


def test_chosen_folder_of_another_run_is_refused(digits: ImageData, tmp_path: Path) -> None:
    output = str(tmp_path / "run")
    said: list[str] = []
    prepare_output(replace(TINY, output=output), digits, said.append)
    assert said == []
    prepare_output(replace(TINY, output=output), digits, said.append)
    assert "holds an earlier run with the same settings, which this one replaces" in said[0]
    with pytest.raises(ValueError, match=r"run holds another run \(lr 0.01 there, 0.5 here\); choose another"):
        prepare_output(replace(TINY, lr=0.5, output=output), digits, said.append)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == 0.01


def test_default_folder_of_another_run_gets_a_number(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    names = [str(prepare_output(replace(TINY, seed=seed), digits, said.append)) for seed in (0, 1, 2, 1)]
    default = "runs/digits-imixer_ti4_32"
    assert names == [default, f"{default}-2", f"{default}-3", f"{default}-2"]
    assert said[0] == f"{default} holds a run with other settings, which stays"


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"lr": 1}'])
def test_folder_of_unknown_files_is_not_overwritten(digits: ImageData, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"holds another run \((its config.json is|.*lr 1 there, 0.01 here)"):
        prepare_output(replace(TINY, output=str(tmp_path)), digits, print)
    assert (tmp_path / "config.json").read_text() == content


def test_folder_that_cannot_be_written_fails_before_training(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(training, "make_loader", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(OSError, match=r"cannot write to the output folder .*file/run.*choose another --output"):
        train(replace(TINY, output=str(tmp_path / "file" / "run")), digits, progress=False)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "curves.csv"
    write_atomically(path, b"old")

    def full_disk(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]

"""Training: files, curves, seeds, and the errors that stop a run."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn
from training_runs import TINY, read_curves

from imixer.data import ImageData, make_loader
from imixer.training import (
    TrainingConfig,
    TrainingResult,
    build_model,
    evaluate,
    load_data,
    loop,
    train,
)
from imixer.training.run_folder import claimed_new_folder

RUN_FILES = [
    ".lock",
    "best.pt",
    "config.yaml",
    "convergence.csv",
    "curves.csv",
    "curves.png",
    "environment.json",
    "last.pt",
    "previous.pt",
    "summary.json",
    "tensorboard",
]


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(TINY)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: ImageData) -> TrainingResult:
    config = replace(TINY, output=str(tmp_path_factory.mktemp("run") / "new" / "folder"))
    return train(config, digits, progress=False)


def test_run_leaves_its_files(run: TrainingResult) -> None:
    assert sorted(path.name for path in run.output.iterdir()) == RUN_FILES
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


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_checkpoint_rebuilds_the_model(run: TrainingResult, digits: ImageData, name: str) -> None:
    path = run.output / name
    checkpoint = torch.load(path, weights_only=True)
    model = timm.create_model(checkpoint["model"], checkpoint_path=path, **checkpoint["model_args"])
    found = evaluate(model, make_loader(digits.test, batch_size=100, training=False, workers=0, seed=0))
    row = run.metrics[checkpoint["epoch"] - 1]
    assert (found.top1, found.top5) == (row.test_top1, row.test_top5)
    assert found.loss == pytest.approx(row.test_loss, rel=1e-5)
    assert row.test_top1 == (max(row.test_top1 for row in run.metrics) if name == "best.pt" else row.test_top1)
    assert checkpoint["classes"] == list("0123456789")
    assert (checkpoint["mean"], checkpoint["std"]) == (list(digits.mean), list(digits.std))
    assert checkpoint["environment"]["versions"]["torch"] == torch.__version__
    assert checkpoint["optimizer"]["state"]


def test_settings_versions_and_results_are_kept(run: TrainingResult) -> None:
    settings = yaml.safe_load((run.output / "config.yaml").read_text())
    assert TrainingConfig(**settings) == replace(TINY, output=None)
    environment = json.loads((run.output / "environment.json").read_text())
    assert environment["versions"]["timm"] == timm.__version__
    assert environment["git_commit"] is None or len(environment["git_commit"].rstrip("+")) == 40
    summary = json.loads((run.output / "summary.json").read_text())
    assert summary["best"]["test_top1"] == max(row.test_top1 for row in run.metrics)
    assert (summary["last"]["epoch"], summary["updates"], summary["nonfinite_updates"]) == (3, 60, 0)


@pytest.mark.long
def test_each_imlp_is_looked_at_in_some_epochs_and_the_last(digits: ImageData, tmp_path: Path) -> None:
    changes = {
        "num_blocks": 2,
        "epochs": 3,
        "report_interval": 2,
        "solver": "anderson",
        "n_iter": 30,
        "rtol": 1e-4,
        "backward": "implicit",
    }
    train(replace(TINY, **changes, output=str(tmp_path)), digits, progress=False)  # type: ignore[arg-type]
    with (tmp_path / "convergence.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["name"]) for row in rows] == [
        (epoch, f"blocks.{block}.mlp_tokens") for epoch in "23" for block in "01"
    ]
    for row in rows:
        assert 0 < float(row["worst_residual"]) <= 1e-4
        assert 1 < int(row["n_iter"]) <= 30
        assert float(row["sigma1"]) > 0
        assert float(row["sigma2"]) > 0
        assert float(row["adjoint_residual"]) < 1e-3
        assert float(row["adjoint_failed"]) == 0


def test_imlps_of_other_depths_train(digits: ImageData, tmp_path: Path) -> None:
    mixer = replace(TINY, epochs=1, hidden_layers=1, output=str(tmp_path / "1"))
    train(mixer, digits, progress=False)
    assert not (tmp_path / "1" / "convergence.csv").exists()
    changes = {"hidden_layers": 3, "hidden_solve": "joint", "tied": True, "contraction": "certified"}
    deeper = replace(TINY, epochs=1, **changes, output=str(tmp_path / "3"))  # type: ignore[arg-type]
    train(deeper, digits, progress=False)
    with (tmp_path / "3" / "convergence.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["sigma2"]) > 0
    arguments = torch.load(tmp_path / "3" / "last.pt", weights_only=True)["model_args"]
    assert changes.items() <= arguments.items()


def test_unrolled_gradients_take_no_linear_solve(run: TrainingResult) -> None:
    with (run.output / "convergence.csv").open(newline="") as file:
        assert {row["adjoint_residual"] for row in csv.DictReader(file)} == {""}


def test_tensorboard_has_the_curves(run: TrainingResult) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.output / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [50]
    assert [event.step for event in events.Scalars("test/top1")] == [20, 40, 60]
    assert events.Scalars("test/top1")[-1].value == pytest.approx(run.metrics[-1].test_top1)
    assert "blocks.0.mlp_tokens/sigma1" in events.Tags()["scalars"]


def test_evaluate_counts_all_images(digits: ImageData) -> None:
    model = build_model(TINY, digits)
    nn.init.normal_(model.get_parameter("head.weight"))  # else all classes are equally likely
    images, targets = next(iter(make_loader(digits.test, batch_size=500, training=False, workers=0, seed=0)))
    with torch.no_grad():
        logits = model.eval()(images)
    found = evaluate(model, make_loader(digits.test, batch_size=64, training=False, workers=0, seed=0))
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    assert found.top1 == pytest.approx(100 * (logits.argmax(1) == targets).float().mean().item(), rel=1e-5)
    in_top5 = (logits.topk(5).indices == targets[:, None]).any(1)
    assert found.top5 == pytest.approx(100 * in_top5.float().mean().item(), rel=1e-5)


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
    weights = torch.load(tmp_path / "last.pt", weights_only=True)["state_dict"]
    assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.float32}


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
            r"cannot build resnet18 with num_classes=10, .*num_blocks=1.*unexpected keyword",
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
        ({"batch_size": 3, "mixup": 0.1}, "batch_size must be even for mixup and cutmix, which mix pairs, not 3"),
        ({"checkpoint_interval": "5m"}, "checkpoint_interval must be updates such as 500 or seconds such as 600s, not"),
        ({"cache_mb": 1, "aa": "rand-m9"}, "aa: for images that are read in every epoch, .*add --cache-mb 0"),
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


def test_folder_of_a_run_is_never_used_again(
    run: TrainingResult, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"holds a run; continue it with --resume .*, or choose another --output"):
        train(replace(TINY, output=str(run.output)), digits)
    monkeypatch.chdir(tmp_path)
    default = "runs/digits-imixer_ti4_32"
    for number, name in enumerate((default, f"{default}-2", f"{default}-3"), start=2):
        with claimed_new_folder(TINY, digits.name) as folder:
            assert str(folder) == name
            with claimed_new_folder(TINY, digits.name) as another:
                assert another.name == f"digits-imixer_ti4_32-{number}"
            (folder / "last.pt").touch()


def test_folder_that_cannot_be_written_fails_before_training(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(loop, "make_loader", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(OSError, match=r"cannot write to the output folder .*file/run.*choose another --output"):
        train(replace(TINY, output=str(tmp_path / "file" / "run")), digits, progress=False)

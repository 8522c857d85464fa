"""What a run records as it goes on: trackers, and statistics of the solves."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
from training_runs import TINY

from imixer.data import ImageData
from imixer.training import TrainingConfig, load_data, reporting, train
from imixer.training.progress import Progress

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(TINY)


def test_resumed_points_replace_those_after_the_checkpoint(digits: ImageData, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(TINY, epochs=2, log_interval=10, output=str(tmp_path))
    train(config, digits, progress=False)
    (tmp_path / "last.pt").unlink()
    train(config, digits, resume=tmp_path, progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20, 30, 40]
    parts = {tag for tag in events.Tags()["scalars"] if tag.startswith("seconds/")}
    assert parts == {"seconds/steps", "seconds/test", "seconds/report", "seconds/checkpoint"}


def test_solves_to_a_tolerance_are_recorded(digits: ImageData, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(TINY, epochs=2, log_interval=10, n_iter=20, rtol=1e-3, solver="anderson", output=str(tmp_path))
    train(config, digits, progress=False)
    with (tmp_path / "solves.csv").open(newline="") as file:
        whole = list(csv.DictReader(file))
    # 23 updates an epoch; the solves of tests and reports are no part of them.
    assert [int(row["step"]) for row in whole] == [10, 20, 30, 40]
    assert {float(row["samples"]) for row in whole} == {TINY.batch_size * 16}  # every channel is a sample of its own
    assert all(float(row["converged"]) == 1 and 1 < float(row["mean_steps"]) < 20 for row in whole)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (tag,) = (tag for tag in events.Tags()["scalars"] if tag.endswith("/mean_steps"))
    assert [event.value for event in events.Scalars(tag)] == pytest.approx([float(row["mean_steps"]) for row in whole])

    # Updates after the checkpoint that a run goes on from did not happen; a line may have been cut off.
    (tmp_path / "last.pt").unlink()
    with (tmp_path / "solves.csv").open("a") as file:
        file.write("50,blocks.0.mlp_tok")
    train(config, digits, resume=tmp_path, progress=False)
    with (tmp_path / "solves.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == whole


def test_fixed_numbers_of_steps_are_not_recorded(digits: ImageData, tmp_path: Path) -> None:
    train(replace(TINY, epochs=1, output=str(tmp_path)), digits, progress=False)
    assert not (tmp_path / "solves.csv").exists()


def test_trackers_are_chosen_by_name(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(replace(TINY, epochs=1, log_with=("none",), output=str(tmp_path / "none")), digits, progress=False)
    assert not (tmp_path / "none" / "tensorboard").exists()
    with pytest.raises(ValueError, match="log_with 'wandbb' is unknown; known are .*wandb, .*, or none alone"):
        TrainingConfig(log_with=("wandbb",))
    with pytest.raises(ValueError, match="or none alone"):
        TrainingConfig(log_with=("none", "tensorboard"))
    seen: dict[str, Any] = {"points": []}

    class Recorder(accelerate.tracking.GeneralTracker):  # type: ignore[misc]
        """In the place of Weights & Biases, which is not installed."""

        name, requires_logging_directory = "wandb", False

        def __init__(self, project: str, **options: Any) -> None:
            super().__init__()
            seen.update(project=project, options=options)

        @property
        def tracker(self) -> Recorder:
            return self

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            seen["settings"] = values

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            seen["points"].append((step, values))

        def finish(self) -> None:
            seen["finished"] = True

    config = replace(TINY, epochs=1, log_with=("tensorboard", "wandb"), output=str(tmp_path / "both"))
    monkeypatch.setattr(reporting, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(
        ValueError, match="log_with wandb needs a package that is not installed; install it .pip install"
    ):
        train(config, digits, progress=False)
    assert not (tmp_path / "both").exists()
    monkeypatch.setattr(reporting, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    train(config, digits, progress=False)
    assert (seen["project"], seen["options"]) == ("imixer", {"name": "both", "dir": str(tmp_path / "both")})
    assert (seen["settings"]["epochs"], seen["settings"]["log_with"]) == (1, "tensorboard wandb")
    assert seen["points"][-1][0] == 20
    assert "test/top1" in seen["points"][-1][1]
    assert seen["finished"]
    assert (tmp_path / "both" / "tensorboard").is_dir()


def test_a_row_of_failed_updates_starts_anew_in_a_resumed_run() -> None:
    """Otherwise a run that stopped for too many of them would stop again at the first."""
    at = Progress()
    for finite in (True, False, False):
        at.count(1, 2.0, finite=finite, lr=0.1)
    assert (at.nonfinite, at.nonfinite_in_row) == (2, 2)
    resumed = Progress.from_dict(at.as_dict())
    assert resumed == replace(at, nonfinite_in_row=0)

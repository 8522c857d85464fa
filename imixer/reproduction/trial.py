"""A trial: one training configuration with one seed, and the folder that holds what came of it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imixer.reproduction.shapes import SHAPES, check_shape
from imixer.training import TrainingConfig
from imixer.training.checkpoints import write_atomically

TRAINED, FAILED, STARTED, ENVIRONMENTS = "training.json", "failure.json", "started.json", "environments.json"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of training. Trials with equal settings are one trial, whichever experiments they belong to.

    Args:
        data: Short name of the data set.
        settings: Settings by the names of :class:`imixer.training.TrainingConfig`, the seed included.
        place: Settings that say where and on what the trial runs, which its result does not depend on: the folder of
            the images, the device, the number of worker processes.
    """

    data: str
    settings: Mapping[str, Any]
    place: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of its folder: what a person looks for first, and a digest of all settings."""
        content = json.dumps([self.data, sorted(self.settings.items())], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        return f"{self.data}-{self.settings['model']}-seed{self.settings['seed']}-{digest}"

    def config(self, output: Path, *, checkpoint_interval: str = "") -> TrainingConfig:
        """The configuration of its training run.

        Args:
            output: Folder of the run.
            checkpoint_interval: Updates between checkpoints within an epoch; empty for none.

        Raises:
            ValueError: A setting is unknown to the training or out of its range.
        """
        settings = {**self.settings, **self.place, "output": str(output), "checkpoint_interval": checkpoint_interval}
        try:
            return TrainingConfig(**settings)
        except TypeError as error:
            raise ValueError(f"the training does not know a setting of this trial: {error}") from error


@dataclass(frozen=True)
class TrialFolder:
    """The files of one trial.

    ``run/`` is the folder of the training run. ``training.json`` is there when the training is complete, and one file
    for each measurement of the trained model when that is complete. ``environments.json`` has the versions, threads and
    machines that the trial ran with. All files are replaced in one step.

    Args:
        path: The folder.
    """

    path: Path

    @property
    def run(self) -> Path:
        """Folder of the training run."""
        return self.path / "run"

    def read(self, name: str) -> Any:
        """Content of a JSON file; None if it is not there.

        Raises:
            ValueError: The file is damaged, or cannot be read.
        """
        return read_json(self.path / name, then="run the trial again")

    def read_sound(self, name: str) -> Any:
        """Content of a JSON file; None if it is not there, is damaged or cannot be read."""
        try:
            return self.read(name)
        except ValueError:
            return None

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        replace_file(self.path / name, json.dumps(content, indent=1).encode() + b"\n")

    def failed_in(self, sweep: str) -> bool:
        """Whether the trial failed in this sweep."""
        failure = self.read_sound(FAILED)  # with a damaged one it is tried again
        return failure is not None and failure["sweep"] == sweep

    def missing(self, measurements: tuple[str, ...]) -> list[str]:
        """What is still to be done of the training and these measurements; a file that is damaged is none."""
        return [name for name in (TRAINED, *map(measurement_file, measurements)) if not self.holds(name)]

    def holds(self, name: str) -> bool:
        """Whether a result is there and not damaged."""
        return self.read_sound(name) is not None


def measurement_file(measurement: str) -> str:
    """Name of the file that holds a measurement's result."""
    return f"{measurement}.json"


def folder_of(trial: Trial, output: Path) -> TrialFolder:
    """The folder of a trial below the output folder of all experiments."""
    return TrialFolder(output / "trials" / trial.name)


def read_json(path: Path, *, then: str) -> Any:
    """Content of a JSON file, in the shape that :data:`SHAPES` has for its name; None if it is not there.

    Args:
        path: The file.
        then: What to do when a damaged one is removed.

    Raises:
        ValueError: It is damaged, or cannot be read.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        check_shape(content, SHAPES.get(path.name, {}))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); make {path.parent} a folder that can be read, or move it away"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and {then}") from error
    return content


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step, and make the folder that it is in.

    Raises:
        OSError: It cannot be written; the message says what to do.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise OSError(
            f"cannot write {path} ({error.strerror}); make room, allow writing there, or choose another --output"
        ) from error

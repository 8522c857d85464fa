"""Running one trial: claim it, train or go on training, measure, and say how it ended."""

import os
import platform
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import timm
import torch

import imixer.reproduction.mixers  # noqa: F401  registers the models
from imixer.checkpoint_file import CheckpointError
from imixer.data import ImageData
from imixer.reproduction.measurements import MEASUREMENTS, TrainedRun
from imixer.reproduction.trial import (
    ENVIRONMENTS,
    FAILED,
    STARTED,
    TRAINED,
    Trial,
    TrialFolder,
    folder_of,
    measurement_file,
)
from imixer.training import TrainingConfig, TrainingInterruptedError, load_data, train
from imixer.training.distributed import choose_device
from imixer.training.folder_lock import FolderInUseError, locked
from imixer.training.run_folder import environment

# Settings that the images of a run depend on, besides the model's own size and interpolation.
OF_THE_IMAGES = ("data_dir", "dataset", "img_size", "cache_mb", "no_aug", "hflip", "crop_pct", "aa", "reprob", "remode")
KEPT = 2  # data sets that a process keeps in memory
_loaded: dict[tuple[Any, ...], ImageData] = {}


class Ending(StrEnum):
    """How a call of :func:`run_trial` ended."""

    COMPLETE = "complete"
    """This call ran what was missing."""
    ALREADY = "already"
    """Nothing was missing."""
    BUSY = "busy"
    """Another process runs the trial."""
    FAILED = "failed"
    """The trial failed, in this call or in an earlier one of the same sweep."""
    INTERRUPTED = "interrupted"
    """The process was told to stop, and the trial has been saved."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A trial with what is to be measured on it.

    Args:
        trial: The trial.
        measurements: Names in :data:`imixer.reproduction.measurements.MEASUREMENTS`.
        test_steps: Numbers of steps to test trained models with.
    """

    trial: Trial
    measurements: tuple[str, ...] = ()
    test_steps: tuple[int, ...] = ()

    def missing(self, output: Path) -> list[str]:
        """The files that are still to be made."""
        return folder_of(self.trial, output).missing(self.measurements)


def run_trial(task: Task, output: Path, sweep: str) -> Ending:
    """Do what is missing of a trial, unless another process is at it.

    The lock of the trial's folder is held for as long as it runs; the operating system releases it when the process
    ends, however that happens. A trial that fails leaves ``failure.json``, and is tried again by the next sweep; where
    that cannot be written, stderr has the reason.

    Args:
        task: The trial and its measurements.
        output: Folder of all trials.
        sweep: An identifier of this sweep, the same in all of its processes.
    """
    folder = folder_of(task.trial, output)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        with locked(folder.path):
            return _run_claimed(task, folder, sweep)
    except FolderInUseError:
        return Ending.BUSY
    except OSError as error:
        print(f"{error}; {folder.path} has to be a folder that can be written", file=sys.stderr)
        return Ending.FAILED


def record_failure(folder: TrialFolder, sweep: str, reason: str, details: str = "") -> None:
    """Leave a note of why a trial failed."""
    folder.write(FAILED, {"sweep": sweep, "reason": reason, "details": details})


def _run_claimed(task: Task, folder: TrialFolder, sweep: str) -> Ending:
    if not folder.missing(task.measurements):
        return Ending.ALREADY
    if folder.failed_in(sweep):
        return Ending.FAILED
    folder.write(STARTED, {"sweep": sweep, "pid": os.getpid(), "host": platform.node()})
    folder.write("trial.json", {"data": task.trial.data, "settings": dict(task.trial.settings)})
    try:
        _train_and_measure(task, folder)
    except TrainingInterruptedError:
        return Ending.INTERRUPTED
    except Exception as error:  # whatever is wrong with one trial leaves the others alone
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, CheckpointError):
            reason += f"; remove {folder.run}, and the next command trains this trial anew"
        record_failure(folder, sweep, reason, traceback.format_exc())
        return Ending.FAILED
    (folder.path / FAILED).unlink(missing_ok=True)
    return Ending.COMPLETE


def _train_and_measure(task: Task, folder: TrialFolder) -> None:
    config = task.trial.config(folder.run)
    data = load_images(config)
    if "step" in task.measurements:  # which looks at weights from the middle of the training, if there are no others
        updates = -(-len(data.train) // config.batch_size)
        if config.epochs == 1:
            config = task.trial.config(folder.run, checkpoint_interval=str(-(-updates // 2)))
    note_environment(folder, choose_device(config.device))
    resume = folder.run if has_checkpoint(folder.run) else None
    started = time.monotonic()
    result = train(config, data, resume=resume, progress=False)
    if not folder.holds(TRAINED):
        folder.write(
            TRAINED,
            {"metrics": [asdict(row) for row in result.metrics], "seconds_here": time.monotonic() - started},
        )
    run = TrainedRun(model=result.model, data=data, config=config, folder=folder.run, test_steps=task.test_steps)
    for name in task.measurements:
        if not folder.holds(measurement_file(name)):
            folder.write(measurement_file(name), MEASUREMENTS[name](run))


def note_environment(folder: TrialFolder, device: torch.device) -> None:
    """Add versions, threads and machine of this process to those that the trial ran with."""
    found = environment()
    here = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, **found["versions"]}
    here |= {name: str(found[name]) for name in ("threads", "machine", "git_commit") if found[name] is not None}
    before = folder.read_sound(ENVIRONMENTS) or []
    if here not in before:
        folder.write(ENVIRONMENTS, [*before, here])


def has_checkpoint(run: Path) -> bool:
    """Whether a training run left something to go on from."""
    return any((run / name).is_file() for name in ("last.pt", "previous.pt"))


def load_images(config: TrainingConfig) -> ImageData:
    """The images of a run, which are kept for the next trials of this process.

    Args:
        config: The settings.
    """
    cfg = timm.get_pretrained_cfg(config.model)
    key = tuple(getattr(config, name) for name in OF_THE_IMAGES)
    if cfg is not None:
        key += (cfg.input_size, cfg.interpolation, cfg.crop_pct, cfg.mean, cfg.std)
    if key not in _loaded:
        while len(_loaded) >= KEPT:
            del _loaded[next(iter(_loaded))]
        _loaded[key] = load_data(config)
    return _loaded[key]

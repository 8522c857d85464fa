"""Where a run begins: a folder of its own, and the checkpoint that it goes on from, checked to be of this run."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from imixer.checkpoint_file import CheckpointError
from imixer.data import ImageData
from imixer.training.checkpoints import (
    BEST,
    LAST,
    folder_of,
    is_run,
    load_checkpoint,
    read_checkpoint,
    set_aside_refused,
    write_atomically,
)
from imixer.training.config import TrainingConfig
from imixer.training.distributed import from_first
from imixer.training.model import model_arguments
from imixer.training.progress import Progress
from imixer.training.run_folder import claimed, claimed_new_folder, environment, prepare_folder


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins.

    Args:
        folder: Its folder, which this run has claimed.
        source: The checkpoint's file; None for a new run.
        checkpoint: What it goes on from, to be cleared when that is loaded; None for a new run.
        progress: Where that stands.
        fingerprint: Which images it is trained on.
        notes: What to say about that, each one line.
    """

    folder: Path
    source: Path | None
    checkpoint: dict[str, Any] | None
    progress: Progress
    fingerprint: dict[str, str | int]
    notes: tuple[str, ...]


@contextlib.contextmanager
def begin(
    config: TrainingConfig, data: ImageData, accelerator: Accelerator, resume: Path | None, *, allow_other_data: bool
) -> Iterator[Start]:
    """Claim the folder of a run, for as long as the context lasts, and read what it goes on from; write nothing yet.

    A run that is resumed goes on in its own folder, unless `config.output` names another. One state of it, such as
    `best.pt`, goes on in a new folder, and the run stays as it is. All processes have to call it; the first one claims
    the folder, and what goes wrong there is raised in all of them.

    Args:
        config: The settings.
        data: The images.
        accelerator: The processes.
        resume: A run's folder, or one of its checkpoints; None begins a new run.
        allow_other_data: Go on with other images of the same classes.

    Raises:
        ValueError: The folder of a new run holds one, or the checkpoint is damaged or of another run.
        OSError: The folder is in use or cannot be written, or there is no checkpoint.
    """
    read: list[dict[str, Any] | None] = [None]

    def find() -> tuple[Path, Path | None, list[str], dict[str, str | int]]:
        folder, source, checkpoint, notes = _claim(claim, config, data.name, resume)
        fingerprint = data.fingerprint()
        del fingerprint["name"]  # that of the folder, which may move
        if source is not None and checkpoint is not None:
            world_size = accelerator.num_processes
            check_same_run(source, checkpoint, identity(config, data, world_size), world_size)
            notes += _differences(source, checkpoint, config, fingerprint, allow_other_data)
        read[0] = checkpoint
        return folder, source, notes, fingerprint

    with contextlib.ExitStack() as claim:
        folder, source, notes, fingerprint = from_first(accelerator, find)
        if source is not None and not accelerator.is_main_process:
            read[0] = read_checkpoint(source)
        progress = Progress() if read[0] is None else Progress.from_dict(read[0]["progress"])
        yield Start(
            folder=folder,
            source=source,
            checkpoint=read[0],
            progress=progress,
            fingerprint=fingerprint,
            notes=tuple(notes),
        )


def prepare(start: Start, config: TrainingConfig, accelerator: Accelerator) -> list[str]:
    """Write what the run's folder holds from its start, when everything that may fail before has been made.

    All processes have to call it.

    Returns:
        What to say about that, each one line.

    Raises:
        OSError: It cannot be written.
    """

    def write() -> list[str]:
        here = start.source is None or start.folder == start.source.parent
        if start.source is not None and here:
            set_aside_refused(start.source)
        prepare_folder(start.folder, config)
        return [] if start.source is None or here else _taken_along(start.source, start.progress, start.folder)

    return from_first(accelerator, write)


def _claim(
    claim: contextlib.ExitStack, config: TrainingConfig, data_name: str, resume: Path | None
) -> tuple[Path, Path | None, dict[str, Any] | None, list[str]]:
    """Claim a folder; return it, the checkpoint to go on from with its file, and what to say."""
    if resume is None:
        return claim.enter_context(claimed_new_folder(config, data_name)), None, None, []
    notes: list[str] = []
    folder = folder_of(resume)
    elsewhere = config.output is not None and Path(config.output).resolve() != folder.resolve()
    if is_run(resume) and not elsewhere:
        if folder.exists():
            claim.enter_context(claimed(folder))  # before reading, so that no other run changes what is there
        checkpoint, source = load_checkpoint(resume, notes.append)
        return folder, source, checkpoint, notes
    checkpoint, source = load_checkpoint(resume, notes.append)
    folder = claim.enter_context(claimed_new_folder(config, data_name))
    notes.append(f"going on from {source} in {folder}; {source.parent} stays as it is")
    return folder, source, checkpoint, notes


def _taken_along(source: Path, progress: Progress, folder: Path) -> list[str]:
    """Put the last and the best checkpoint of a run into the folder where it goes on; return what to say."""
    content, best, file = source.read_bytes(), progress.best, source.with_name(BEST)
    write_atomically(folder / LAST, content)

    def is_best(at: Progress) -> bool:
        return not at.step and at.metrics[-1:] == [best]

    if best is None:
        return []
    if is_best(progress):
        write_atomically(folder / BEST, content)
        return []
    with contextlib.suppress(CheckpointError, OSError):
        if is_best(Progress.from_dict(read_checkpoint(file)["progress"])):
            write_atomically(folder / BEST, file.read_bytes())
            return []
    return [f"{file} is not that of epoch {best.epoch}, the best so far: there will be one after a better epoch"]


def _differences(
    source: Path,
    checkpoint: dict[str, Any],
    config: TrainingConfig,
    fingerprint: dict[str, str | int],
    allow_other_data: bool,
) -> list[str]:
    """What is not as it was besides the settings, as lines.

    Raises:
        CheckpointError: The images are others, or are read in another way, and may not be.
    """
    notes = []
    other_data = changes(checkpoint.get("data"), fingerprint)
    if other_data and not allow_other_data:
        cached = checkpoint["config"].get("cache_mb", config.cache_mb)
        what = f"on other images ({other_data}); give it the same ones"
        if cached != config.cache_mb:
            what = (
                f"with cache_mb {cached}, and with {config.cache_mb} its images would be augmented and normalized in "
                f"another way; give --cache-mb {cached}"
            )
        raise CheckpointError(f"{source} is of a run {what}, or go on with these by --allow-other-data")
    if other_data:
        notes.append(f"the images are others than before: {other_data}")
    other_versions = changes(*(_versions(place) for place in (checkpoint["environment"], environment())))
    if other_versions:
        notes.append(f"not as before, so that results may differ in the last bits: {other_versions}")
    with restoring("progress"):
        Progress.from_dict(checkpoint["progress"])
    return notes


def identity(config: TrainingConfig, data: ImageData, world_size: int) -> dict[str, Any]:
    """Settings that must match the checkpoint: model, classes, images of an update, and what an optimizer keeps."""
    batch_size, grad_accum_steps = config.batches(world_size)
    return {
        "model": config.model,
        "model_args": model_arguments(config, data),
        "classes": list(data.classes),
        "global_batch": batch_size * world_size,
        "grad_accum_steps": grad_accum_steps,
        "opt": config.opt,
        "opt_kwargs": config.opt_kwargs,
        "layer_decay": config.layer_decay,
    }


def check_same_run(source: Path, checkpoint: dict[str, Any], here: dict[str, Any], world_size: int) -> None:
    """Check that a checkpoint is of the run that `identity` describes.

    Raises:
        CheckpointError: It is of another one; the message says what differs.
    """
    differing = [name for name, value in here.items() if checkpoint.get(name) != value]
    if not differing:
        return
    images, steps = checkpoint.get("global_batch"), checkpoint.get("grad_accum_steps")
    is_cut_otherwise = set(differing) <= {"global_batch", "grad_accum_steps"}
    if is_cut_otherwise and isinstance(images, int) and isinstance(steps, int):
        batch, rest = divmod(images, world_size)
        advice = "another number of processes" if rest else f"--batch-size {batch}"
        if not rest and "grad_accum_steps" in differing:
            advice += f" --grad-accum-steps {steps}"
        raise CheckpointError(
            f"{source} is of a run with {steps} x {images} images to an update, steps times images of all processes in "
            f"a step, which here would be {here['grad_accum_steps']} x {here['global_batch']}; to continue it with "
            f"{world_size} process{'es' if world_size > 1 else ''}, give {advice}"
        )
    others = ", ".join(f"{name} {_short(checkpoint.get(name))} there, {_short(here[name])} here" for name in differing)
    raise CheckpointError(f"{source} is of another run: {others}")


def describe_changes(checkpoint: dict[str, Any], config: TrainingConfig) -> str:
    """The settings that are not those of the run so far, as the end of a sentence."""
    changed = changes(checkpoint["config"], {k: v for k, v in asdict(config).items() if k != "output"})
    return f", with {changed}" if changed else ""


def changes(there: Any, here: dict[str, Any]) -> str:
    """The entries of ``here`` that have another value in ``there``, as text."""
    before = there if isinstance(there, dict) else {}
    pairs = {name: (before.get(name), value) for name, value in here.items() if before.get(name) != value}
    return ", ".join(f"{name} {_short(old)} -> {_short(new)}" for name, (old, new) in pairs.items())


@contextlib.contextmanager
def restoring(what: str) -> Iterator[None]:
    """Inside, a part of a checkpoint is loaded.

    Raises:
        CheckpointError: It does not fit.
    """
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the {what} of the checkpoint cannot be used: {reason}") from error


def _versions(environment: Any) -> dict[str, Any]:
    """What the bits of a result depend on besides settings and images."""
    found = environment if isinstance(environment, dict) else {}
    versions = found.get("versions")
    return {**(versions if isinstance(versions, dict) else {}), "threads": found.get("threads")}


def _short(value: Any) -> str:
    text = ", ".join(f"{key}={entry}" for key, entry in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."

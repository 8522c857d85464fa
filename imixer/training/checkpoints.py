"""Checkpoints that survive whatever stops a run.

A checkpoint is written beside the ones before it and takes its place in one step, when it is safely on the disk. A run
keeps three: ``last.pt``, ``previous.pt``, which was last before it, and ``best.pt``. Reading one verifies its digest.
"""

import contextlib
import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imixer.checkpoint_file import FORMAT, CheckpointError, read_file, serialize

LAST, PREVIOUS, BEST, REFUSED = "last.pt", "previous.pt", "best.pt", "refused.pt"
# What a run goes on from: entries of a checkpoint, and those that are dicts.
STATE = ("state_dict", "state_dict_ema", "optimizer", "scaler", "progress", "epoch", "config", "environment")
DICTS = ("state_dict", "optimizer", "progress", "config", "environment")


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace a file in one step: readers, and a crash at any moment, see the old file or the new one."""
    temporary = _write_beside(path, content)
    _rename(temporary, path)


def save_checkpoint(folder: Path, checkpoint: dict[str, Any], *, best: bool = False) -> None:
    """Make ``checkpoint`` the folder's last one; the one before stays, as ``previous.pt``.

    Args:
        folder: The run's folder.
        checkpoint: Tensors and plain Python values.
        best: Make it the best one as well. Both names are of one file where the file system can do that.

    Raises:
        OSError: It could not be written. The checkpoints that were there are there still.
    """
    last, content = folder / LAST, serialize(checkpoint)
    try:
        temporary = _write_beside(last, content)
        if best:
            _rename(_linked(temporary, folder / BEST, content), folder / BEST)
        if last.exists():
            os.replace(last, folder / PREVIOUS)
        _rename(temporary, last)
    except OSError as error:
        with contextlib.suppress(OSError):
            remove_unfinished(folder)
        kept = ", ".join(name for name in (LAST, PREVIOUS) if (folder / name).exists())
        then = f"{kept} of before is there still. Make room, then continue with --resume {folder}"
        if not kept:
            then = "there is no earlier one. Make room, then start again"
        raise OSError(f"cannot save a checkpoint to {folder}: {error}; {then}") from error


def holds_run(folder: Path) -> bool:
    """Whether a run has saved a checkpoint there."""
    # os.path's function is false for a folder that may not be looked into, where Path's raises.
    return any(os.path.exists(folder / name) for name in (LAST, PREVIOUS))


def load_checkpoint(path: Path, say: Callable[[str], None] = print) -> tuple[dict[str, Any], Path]:
    """Read the checkpoint to continue from.

    Args:
        path: A run's folder, or its ``last.pt``: the run's last checkpoint is read, or the one before if that is
            damaged. Any other file is read itself, and nothing takes its place.
        say: Told why a checkpoint was refused, if another one is taken.

    Returns:
        The checkpoint, its tensors on the CPU, and the file that it came from.

    Raises:
        FileNotFoundError: There is none.
        OSError: One cannot be read.
        CheckpointError: There is none that can be used; the message says why.
    """
    # A run that was killed between two renames has only the one before.
    if not path.exists() and not (path.name == LAST and path.with_name(PREVIOUS).exists()):
        raise FileNotFoundError(f"there is no run or checkpoint at {path}; give a run's folder, or its {LAST}")
    if not is_run(path):
        return read_checkpoint(path), path
    folder = folder_of(path)
    candidates = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    if not candidates:
        holds = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{folder} holds no checkpoint ({LAST} or {PREVIOUS}); it holds {holds}")
    refused: list[str] = []
    for file in candidates:
        try:
            checkpoint = read_checkpoint(file)
        except CheckpointError as error:
            refused.append(str(error))
        else:
            for reason in refused:
                say(f"{reason}; continuing from {file} instead")
            return checkpoint, file
    raise CheckpointError("; ".join(refused))


def is_run(path: Path) -> bool:
    """Whether ``path`` means a run, to go on where it is, and not one state of it."""
    return path.is_dir() or path.name == LAST


def folder_of(path: Path) -> Path:
    """Return the folder of the run that ``path`` means, or in which the state lies."""
    return path.parent if path.name == LAST or not path.is_dir() else path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint, its digest verified, running no code from it.

    Raises:
        OSError: It cannot be read.
        CheckpointError: It is damaged, or not a checkpoint of a training run; the message says which.
    """
    checkpoint = read_file(path)
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found != FORMAT:
        keys = sorted(map(str, checkpoint))[:5] if isinstance(checkpoint, dict) else [type(checkpoint).__name__]
        what = f"of the format {found[:60]!r}" if isinstance(found, str) else f"it holds {', '.join(keys)[:200]}"
        raise CheckpointError(
            f"{path} is no checkpoint of a training run ({what}); weights alone go to --initial-checkpoint"
        )
    lacking = [name for name in STATE if name not in checkpoint]
    lacking += [name for name in DICTS if name in checkpoint and not isinstance(checkpoint[name], dict)]
    if lacking:
        raise CheckpointError(f"{path} is no whole checkpoint of a training run: it lacks {', '.join(lacking)}")
    return dict(checkpoint)


def set_aside_refused(source: Path) -> None:
    """Rename a last checkpoint that was refused, so that it does not take the place of the good one before it."""
    last = source.with_name(LAST)
    if source.name == PREVIOUS and last.exists():
        os.replace(last, source.with_name(REFUSED))


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process had not finished writing."""
    for name in glob.glob(".*.tmp", root_dir=folder):
        (folder / name).unlink(missing_ok=True)


def _write_beside(path: Path, content: bytes | memoryview) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _linked(temporary: Path, path: Path, content: bytes | memoryview) -> Path:
    """Another name for the file ``temporary``, to be renamed to ``path``; a copy where links are not possible."""
    link = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(temporary, link)
    except OSError:  # as on FAT
        return _write_beside(path, content)
    return link


def _rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    if os.name == "nt":
        return
    # The name is in the folder, which has to reach the disk as well; Windows does not let it be opened.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

"""Checkpoints that survive whatever stops a run.

A checkpoint is written beside the ones before it and takes its place in one step, when it is safely on the disk. A run
keeps three: ``last.pt``, ``previous.pt``, which was last before it, and ``best.pt``. Reading one checks it whole.
"""

import glob
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LAST, PREVIOUS, BEST, DAMAGED = "last.pt", "previous.pt", "best.pt", "damaged.pt"
FORMAT = "imixer.training/1"


class CheckpointError(ValueError):
    """A file is no checkpoint that a run can continue from."""


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace a file in one step: readers, and a crash at any moment, see the old file or the new one."""
    temporary = _write_beside(path, content)
    _rename(temporary, path)


def save_checkpoint(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Make ``checkpoint`` the folder's last one; the one before stays, as ``previous.pt``.

    Args:
        folder: The run's folder.
        checkpoint: Tensors and plain Python values.

    Raises:
        OSError: It could not be written. The checkpoints that were there are there still.
    """
    last = folder / LAST
    try:
        temporary = _write_beside(last, _serialized(checkpoint))
        if last.exists():
            os.replace(last, folder / PREVIOUS)
        _rename(temporary, last)
    except OSError as error:
        kept = ", ".join(name for name in (LAST, PREVIOUS) if (folder / name).exists()) or "no checkpoint"
        raise OSError(
            f"cannot save a checkpoint to {folder}: {error}; {kept} of before is there still. Make room, then continue "
            f"with --resume {folder}"
        ) from error


def save_best(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Make ``checkpoint`` the folder's best one; without what only training needs."""
    kept = {name: value for name, value in checkpoint.items() if name not in ("optimizer", "scaler")}
    write_atomically(folder / BEST, _serialized(kept))


def load_checkpoint(path: Path, say: Callable[[str], None] = print) -> tuple[dict[str, Any], Path]:
    """Read the checkpoint to continue from: the run's last one, or the one before if that is damaged.

    Args:
        path: A run's folder, or one of its checkpoints.
        say: Told why a checkpoint was refused, if another one is taken.

    Returns:
        The checkpoint, its tensors on the CPU, and the file that it came from.

    Raises:
        FileNotFoundError: There is none.
        CheckpointError: There is none that can be used; the message says why.
    """
    # A run that was killed between two renames has only the one before.
    if not path.exists() and not (path.name == LAST and path.with_name(PREVIOUS).exists()):
        raise FileNotFoundError(f"there is no run or checkpoint at {path}; give a run's folder, or its {LAST}")
    folder, first = (path, path / LAST) if path.is_dir() else (path.parent, path)
    candidates = [file for file in dict.fromkeys((first, folder / PREVIOUS)) if file.exists()]
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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint, every checksum in it verified, running no code from it.

    Raises:
        CheckpointError: It is truncated, damaged, or none of ours; the message says which.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save writes a zip file, with a CRC-32 for every tensor
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"{path} ({_size(path)} bytes) is truncated or no checkpoint: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} inside is wrong")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign pickle raises
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path} is no checkpoint of a training run: {reason}") from error
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found != FORMAT:
        keys = sorted(map(str, checkpoint))[:5] if isinstance(checkpoint, dict) else [type(checkpoint).__name__]
        raise CheckpointError(
            f"{path} is no checkpoint of a training run (it holds {', '.join(keys)}); "
            "weights alone go to --initial-checkpoint"
        )
    if "optimizer" not in checkpoint:
        raise CheckpointError(
            f"{path} holds weights without the optimizer's state; continue from {LAST}, or give it to "
            "--initial-checkpoint"
        )
    return checkpoint


def set_aside_damaged(source: Path) -> None:
    """Rename a damaged last checkpoint, so that it does not take the place of ``source``, the good one before it."""
    last = source.with_name(LAST)
    if source.name == PREVIOUS and last.exists():
        os.replace(last, source.with_name(DAMAGED))


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process had not finished writing."""
    for name in glob.glob(".*.tmp", root_dir=folder):
        (folder / name).unlink(missing_ok=True)


def _serialized(checkpoint: dict[str, Any]) -> memoryview:
    # Into memory first: PyTorch's own writer ends the process if the disk is full.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    return buffer.getbuffer()


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


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,}" if path.exists() else "0"

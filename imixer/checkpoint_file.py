"""Files of weights and checkpoints: reading one runs no code from it, and every damaged byte is noticed.

A checkpoint is what ``torch.save`` writes, a zip archive, whose comment holds a SHA-256 digest of everything before it.
PyTorch and timm read it like any other. File and digest are one, so they cannot disagree after a crash.
"""

import argparse
import hashlib
import io
import os
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

FORMAT = "imixer.training/2"
_MARK = b"sha256:"
_COMMENT_SIZE = len(_MARK) + 2 * hashlib.sha256().digest_size


class CheckpointError(ValueError):
    """A file is damaged, or not the checkpoint that is needed."""


def serialize(checkpoint: dict[str, Any]) -> bytes:
    """Return the bytes of a checkpoint, its digest included.

    Args:
        checkpoint: Tensors and plain Python values.
    """
    # Into memory first: PyTorch's own writer ends the process if the disk is full.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    buffer.seek(-2, os.SEEK_END)  # the length of the archive's comment
    buffer.write(struct.pack("<H", _COMMENT_SIZE) + _MARK)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    buffer.write(digest.encode())
    return buffer.getvalue()


def read_file(path: Path) -> Any:
    """Read a file that ``torch.save`` or safetensors wrote, without running code from it.

    Returns:
        What was saved, with its tensors on the CPU.

    Raises:
        OSError: There is no such file, or it cannot be read.
        CheckpointError: It is damaged, or holds something other than tensors and plain values. The message is one line.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for somebody to write into it
        raise CheckpointError(f"{path} is {'a folder' if path.is_dir() else 'a pipe or a device'}, not a checkpoint")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{_described(path)} is damaged or not a safetensors file: {_line(error)}") from error
    has_digest = _check_digest(path)
    try:
        if not has_digest and zipfile.is_zipfile(path):  # the next best, a CRC-32 for every tensor
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"{path} is damaged: the checksum of {damaged} inside is wrong")
        # timm's script saves its flags as one. PyTorch warns about pickles that it then refuses.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file or a foreign pickle raises
        raise CheckpointError(f"{_described(path)} is damaged or no checkpoint: {_line(error)}") from error
    if not has_digest and isinstance(content, dict) and content.get("format") == FORMAT:
        raise CheckpointError(f"{_described(path)} is damaged: the digest at its end is missing")
    return content


def _check_digest(path: Path) -> bool:
    """Whether the file ends with a digest, which is then right.

    Raises:
        CheckpointError: It ends with a wrong one.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _COMMENT_SIZE))
        comment = file.read()
        if not comment.startswith(_MARK):
            return False
        file.seek(0)
        digest = hashlib.sha256()
        left = size - _COMMENT_SIZE + len(_MARK)
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    if digest.hexdigest().encode() != comment[len(_MARK) :]:
        raise CheckpointError(f"{_described(path)} is damaged: its SHA-256 digest is wrong")
    return True


def _described(path: Path) -> str:
    return f"{path} ({path.stat().st_size:,} bytes)"


def _line(error: Exception) -> str:
    """The reason in one line, without PyTorch's advice to load a file that may run code."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        name = re.search(r"GLOBAL (\S+)", text)
        return f"it holds something other than tensors and plain values{f' ({name[1]})' if name else ''}"
    if isinstance(error, (RuntimeError, ValueError, SafetensorError)):
        return text.strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
    return f"it is cut off, or of another format ({type(error).__name__})"

"""Image files to RGB pictures, whatever the files hold."""

from __future__ import annotations

import io
import os
import stat
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

# Formats that Pillow decodes by itself. Of the others, EPS for one would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# How the names of such files end.
SUFFIXES = tuple(sorted(suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS))


class UnreadableImageError(ValueError):
    """An image cannot be read; the message says which and why, in one line."""


def open_image(path: str, *, header_only: bool = False) -> Image.Image:
    """Decode an image file as RGB, or read only its header to check that it is an image.

    Raises:
        UnreadableImageError: The file is not an image that can be decoded, or not a regular file.
    """
    try:
        # Opening a FIFO without O_NONBLOCK would wait for somebody to write into it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("it is not a regular file")
            return decode_image(file, path, status.st_size, header_only=header_only)
    except (OSError, ValueError) as error:
        if isinstance(error, UnreadableImageError):
            raise
        raise UnreadableImageError(f"cannot read image {path}: {_one_line(error)}; replace or remove it") from error


def decode_image(
    content: BinaryIO | bytes, name: str, num_bytes: int | None = None, *, header_only: bool = False
) -> Image.Image:
    """Decode an image as RGB.

    Args:
        content: The encoded image, or a file of it.
        name: What to call it in errors.
        num_bytes: Size of the file.
        header_only: Return an empty picture for an image with a good header, which takes no decoding.

    Raises:
        UnreadableImageError: It cannot be decoded.
    """
    if isinstance(content, bytes):
        num_bytes, content = len(content), io.BytesIO(content)
    try:
        with Image.open(content, formats=FORMATS) as image:
            return Image.new("RGB", image.size, None) if header_only else _to_rgb(image)
    except Exception as error:  # damaged files make decoders raise errors of any kind
        reason = _one_line(error)
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is not an image of a known format ({', '.join(FORMATS)})"
        raise UnreadableImageError(
            f"cannot read image {name} ({num_bytes} bytes): {reason}; replace or remove it"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB. Pillow clips values above 255; they are scaled here, if their range is known."""
    image.load()
    mode, kind = image.mode, image.format
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # a TIFF's BitsPerSample
    if (mode.startswith("I;16") and bits == 16) or (mode == "I" and kind in ("PNG", "PPM")):
        gray = np.asarray(image).astype(np.float64) / 257  # 65535 becomes 255
        return Image.fromarray(gray.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if mode.startswith(("I", "F")):
        raise ValueError(f"it holds {kind} pixels of Pillow's mode {mode}, of unknown range; convert it to 8 bits")
    return image.convert("RGB")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

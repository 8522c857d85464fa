"""Small trees of image files, written from scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_digit_tree(
    root: Path, *, num_train: int = 24, num_test: int = 8, test: str = "test"
) -> dict[str, np.ndarray]:
    """Write the digits 0, 1 and 2 as `root/<split>/<digit>/<n>.png`, grey images of 8 x 8 pixels.

    Returns:
        The pixels, uint8 (8, 8), by path relative to `root`.
    """
    digits = load_digits()
    written = {}
    for digit in range(3):
        images = digits.images[digits.target == digit]
        for split, chosen in (
            ("train", images[:num_train]),
            (test, images[num_train : num_train + num_test]),
        ):
            folder = root / split / str(digit)
            folder.mkdir(parents=True)
            for number, image in enumerate(chosen):
                pixels = (image * (255 / 16)).round().astype(np.uint8)  # (8, 8)
                Image.fromarray(pixels).save(folder / f"{number:03}.png")
                written[f"{split}/{digit}/{number:03}.png"] = pixels
    return written

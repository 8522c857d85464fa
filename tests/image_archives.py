"""Small data sets in the formats that torchvision reads, written from scikit-learn's digits.

    python tests/image_archives.py ROOT SCRIPT [ARGUMENT ...]

runs a script that takes the CIFAR files below ROOT for the published ones, whose checksums torchvision asks for.
"""

from __future__ import annotations

import io
import json
import pickle
import runpy
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import calculate_md5

CIFARS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def digit_pictures(count: int, size: int = 32) -> tuple[np.ndarray, list[int]]:
    """The first digits as color pictures, uint8 (count, size, size, 3), and what they show."""
    digits = load_digits()
    pictures = [
        Image.fromarray((image * (255 / 16)).round().astype(np.uint8)).resize((size, size)).convert("RGB")
        for image in digits.images[:count]
    ]
    return np.stack([np.asarray(picture) for picture in pictures]), digits.target[:count].tolist()


def photographs(count: int, *, size: int) -> np.ndarray:
    """Crops of the two photographs that come with scikit-learn, uint8 (count, size, size, 3)."""
    whole = load_sample_images().images  # 427 x 640
    corners = np.random.default_rng(0).integers((427 - 3 * size, 640 - 3 * size), size=(count, 2))
    return np.stack(
        [
            np.asarray(Image.fromarray(whole[k % 2][y : y + 3 * size, x : x + 3 * size]).resize((size, size)))
            for k, (y, x) in enumerate(corners)
        ]
    )


def write_cifar(root: Path, name: str = "cifar10", *, num_train: int = 50, num_test: int = 20) -> np.ndarray:
    """Write CIFAR-10's or CIFAR-100's pickles; returns the pictures, training ones first."""
    pictures, targets = digit_pictures(num_train + num_test)
    rows = pictures.transpose(0, 3, 1, 2).reshape(len(pictures), -1)  # (N, 3072): red, green and blue planes
    dataset, label = CIFARS[name], "labels" if name == "cifar10" else "fine_labels"
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    start = 0
    for files, count in ((dataset.train_list, num_train), (dataset.test_list, num_test)):
        for (file_name, _), size in zip(files, [count // len(files)] * len(files), strict=True):
            end = start + size
            write_pickle(folder / file_name, {"data": rows[start:end], label: targets[start:end]})
            start = end
    classes = [f"class {index}" for index in range(10 if name == "cifar10" else 100)]
    write_pickle(folder / dataset.meta["filename"], {dataset.meta["key"]: classes})
    return pictures


def write_pickle(path: Path, content: dict[str, Any]) -> None:
    # The published files are of protocol 2.
    path.write_bytes(pickle.dumps(content, protocol=2))


def checksums(root: Path, name: str = "cifar10") -> dict[str, Any]:
    """The class attributes with which torchvision accepts the files that are there."""
    dataset = CIFARS[name]
    folder = root / dataset.base_folder

    def listed(files: list[list[str]]) -> list[list[str]]:
        return [[file_name, calculate_md5(folder / file_name)] for file_name, _ in files]

    meta = dataset.meta | {"md5": calculate_md5(folder / dataset.meta["filename"])}
    return {"train_list": listed(dataset.train_list), "test_list": listed(dataset.test_list), "meta": meta}


def write_food101(root: Path) -> None:
    """Write pictures of two dishes."""
    pictures, _ = digit_pictures(6)
    meta = root / "food-101" / "meta"
    meta.mkdir(parents=True)
    names: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for number, picture in enumerate(pictures):
        dish = ("apple_pie", "waffles")[number % 2]
        folder = root / "food-101" / "images" / dish
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{number}.jpg")
        names["train" if number < 4 else "test"].setdefault(dish, []).append(f"{dish}/{number}")
    for split, dishes in names.items():
        (meta / f"{split}.json").write_text(json.dumps(dishes))


def write_stanford_cars(root: Path) -> None:
    """Write three makes of cars, with annotations in MATLAB's format that count classes from 1."""
    from scipy.io import savemat

    pictures, _ = digit_pictures(5)
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    makes = np.array(["Audi TT", "BMW M3", "Fiat 500"], dtype=object)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": makes})
    columns = [("fname", object), ("class", np.uint8)]
    for split, numbers, path in (
        ("train", (0, 1, 2), base / "devkit" / "cars_train_annos.mat"),
        ("test", (3, 4), base / "cars_test_annos_withlabels.mat"),
    ):
        (base / f"cars_{split}").mkdir()
        for number in numbers:
            Image.fromarray(pictures[number]).save(base / f"cars_{split}" / f"{number}.jpg")
        rows = [(f"{number}.jpg", number % 3 + 1) for number in numbers]
        savemat(path, {"annotations": np.array(rows, dtype=columns)})


def write_imagenet(root: Path) -> None:
    """Write ImageNet as torchvision leaves it when it has unpacked the archives."""
    import torch

    pictures, _ = digit_pictures(4)
    wnids = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish", "Carassius auratus")}
    for number, picture in enumerate(pictures):
        folder = root / ("train", "val")[number // 2] / list(wnids)[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{number}.JPEG")
    torch.save((wnids, list(wnids)), root / "meta.bin")


def pack(folder: Path) -> Path:
    """Replace a folder by a tar of its content."""
    tar = folder.with_suffix(".tar")
    with tarfile.open(tar, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.add(path, path.relative_to(folder), recursive=False)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    return tar


def png_bytes(picture: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="png")
    return content.getvalue()


if __name__ == "__main__":
    for name, dataset in CIFARS.items():
        if (Path(sys.argv[1]) / dataset.base_folder).is_dir():
            for attribute, value in checksums(Path(sys.argv[1]), name).items():
                setattr(dataset, attribute, value)
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")

"""Data sets by timm's names: `torch/cifar10`, `hfds/<folder>`, or none for folders and tars of images."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torchvision
from timm.data import create_dataset
from torchvision.datasets.utils import check_integrity

from imixer.data.folders import TEST_FOLDERS, check_folder, find_splits, holds, list_images, listed
from imixer.data.sources import HuggingFaceImages, ImageArrays, ImageFiles, ImagesInTar, ImageSource

FOLDER_NAMES = ("", "folder", "image_folder", "torch/folder", "torch/image_folder")


def load_sources(
    name: str, root: str | Path, *, train_split: str = "train", test_split: str | None = None, download: bool = False
) -> tuple[ImageSource, ImageSource]:
    """Return the training and the test images of a data set.

    Args:
        name: `torch/<name>` for a class of `torchvision.datasets`, in any case; `hfds/<name>` for a Hugging Face data
            set; "" (or `folder`) for `train` and `test` (or `val`) below `root`, each a folder of class folders or a
            tar of those.
        root: The folder that holds the data. Below it is `<name>` of a Hugging Face data set, as `save_to_disk` leaves
            it or as files that `load_dataset` reads; one of the hub is cached there.
        train_split: Name of the training split.
        test_split: Name of the test split; None takes the first of `TEST_FOLDERS` that is there.
        download: Fetch what is missing, from where torchvision gets it or from the Hugging Face hub.

    Raises:
        FileNotFoundError: The data is not there; the message gives the reason, and says what is there instead.
        NotADirectoryError: `root` is a file.
        ValueError: The name is unknown, the data set is not one of images with classes and a test split, a file is
            damaged, or the splits' classes differ.
        ImportError: A package that the data set needs is not installed.
    """
    root = Path(root)
    kind, _, rest = name.partition("/")
    if name in FOLDER_NAMES:
        splits = find_splits(root, train=train_split, test=test_split)
        train, test = (ImagesInTar(split) if split.is_file() else list_images(split) for split in splits)
        _check_classes(train, test, root, f"{splits[0].name}/", f"{splits[1].name}/")
        return train, test
    if kind == "hfds":
        return _huggingface_sources(rest, root, train_split, test_split, download)
    if kind == "torch":
        return _torchvision_sources(rest, root, train_split, test_split, download)
    raise ValueError(
        f"unknown data set {name!r}; give torch/<name> for a data set of torchvision, hfds/<name> for one of Hugging "
        "Face, or no name for a folder of train/ and test/"
    )


def _torchvision_sources(
    name: str, root: Path, train_split: str, test_split: str | None, download: bool
) -> tuple[ImageSource, ImageSource]:
    kind = _torchvision_class(name)
    if not download:
        check_folder(root)
    tests = [test_split, *TEST_FOLDERS] if test_split in (None, *TEST_FOLDERS) else [test_split]
    try:
        train, test = (
            _torchvision_split(name, kind, root, [split for split in splits if split], download)
            for splits in ([train_split], tests)
        )
    except ImportError as error:
        raise ImportError(f"torch/{name} needs {error.name}; run: pip install {error.name}") from error
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).replace("download=True", "--download").split()).rstrip(".")
        content = holds(root) if root.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"cannot read torch/{name} in {root}, which {content}: {reason}{_unfit_file(kind, root)}; folders of "
            "train/ and test/ are read without a name"
        ) from error
    _check_classes(train, test, root, train_split, "test")
    return train, test


def _torchvision_class(name: str) -> Any:
    """Find a class of `torchvision.datasets` by timm's name for it, such as fashion_mnist, or by its own."""
    kinds = {kind.lower(): getattr(torchvision.datasets, kind) for kind in torchvision.datasets.__all__}
    kind = kinds.get({"inat": "inaturalist"}.get(name.lower(), name.lower().replace("_", "")))
    if kind is None:
        near = difflib.get_close_matches(name.lower(), kinds, n=4, cutoff=0.5) or ["cifar10", "imagenet", "food101"]
        raise ValueError(f"torchvision has no data set {name!r}; did you mean {' or '.join(near)}?")
    return kind


def _torchvision_split(name: str, kind: Any, root: Path, splits: list[str], download: bool) -> ImageSource:
    """Make the first of some splits that the data set has."""
    options = inspect.signature(kind).parameters
    bases = [base for base in inspect.getmro(kind) if issubclass(base, torchvision.datasets.VisionDataset)]
    by_path = any("loader" in inspect.signature(base).parameters for base in bases)
    # With str for its loader, a data set of files gives their paths.
    loader: dict[str, Any] = {"loader": str} if by_path else {}
    refusals = []
    for split in splits:
        try:
            try:
                # timm knows how some data sets call their splits.
                dataset = create_dataset(f"torch/{name}", str(root), split, download=download, **loader)
            except AssertionError:  # it does not know this one
                if "split" not in options:
                    raise ValueError("it has no training and test split") from None
                downloads = {"download": download} if "download" in options else {}
                dataset = kind(str(root), split=split, **downloads, **loader)
        except (TypeError, ValueError) as error:
            refusals.append(" ".join(str(error).split()))
            continue
        return _numbered(dataset, by_path, name, root)
    raise ValueError(f"cannot use torch/{name}, split {' or '.join(splits)}: {refusals[0]}")


def _numbered(dataset: Any, by_path: bool, name: str, root: Path) -> ImageSource:
    """Wrap a data set that gives pictures that it holds in memory, or paths, with a class."""
    if not by_path and not hasattr(dataset, "data"):
        raise ValueError(f"cannot use torch/{name}: torchvision opens its files itself; unpack it to folders of images")
    targets = [dataset[index][1] for index in range(len(dataset))] if by_path else []
    if not isinstance(targets[0] if by_path else dataset[0][1], int):
        raise ValueError(f"cannot use torch/{name}: it does not give one class for each image")
    if hasattr(dataset, "classes"):
        names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in dataset.classes]
    else:
        names = [str(target) for target in range(1 + max(targets or map(int, dataset.labels)))]
    if by_path:
        return ImageFiles([dataset[index] for index in range(len(dataset))], names)
    return ImageArrays(dataset, names, root)


def _unfit_file(kind: Any, root: Path) -> str:
    """Name a file that is missing or damaged, for data sets that list their files with checksums, as CIFAR does."""
    files = [*getattr(kind, "train_list", ()), *getattr(kind, "test_list", ())]
    if hasattr(kind, "meta"):
        files.append((kind.meta["filename"], kind.meta["md5"]))
    for file_name, checksum in files:
        path = root / kind.base_folder / file_name
        if not path.is_file():
            return f" ({path} is missing)"
        if not check_integrity(str(path), checksum):
            return f" ({path}, {path.stat().st_size} bytes, is damaged: it has another checksum than the published one)"
    return ""


def _huggingface_sources(
    name: str, root: Path, train_split: str, test_split: str | None, download: bool
) -> tuple[ImageSource, ImageSource]:
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise ImportError("hfds/ data sets need the package datasets; run: pip install datasets") from error
    folder = root / name
    splits: Mapping[str, Any]
    if (folder / "dataset_dict.json").is_file():
        splits = load_from_disk(folder)
    elif folder.is_dir():
        splits = load_dataset(str(folder))
    elif download:
        splits = load_dataset(name, cache_dir=str(root))
    else:
        check_folder(root)
        raise FileNotFoundError(
            f"no Hugging Face data set {name} in {root}, which {holds(root)}; looked for a folder that save_to_disk "
            "wrote, or one of Parquet or image files; --download fetches it from the hub"
        )
    names = [test_split, *TEST_FOLDERS] if test_split in (None, *TEST_FOLDERS) else [test_split]
    test_name = next((split for split in names if split in splits), None)
    if train_split not in splits or test_name is None:
        wanted = " or ".join(str(split) for split in dict.fromkeys(names) if split)
        raise FileNotFoundError(
            f"{folder} must have the splits {train_split} and {wanted}; its splits are {listed(sorted(splits))}"
        )
    train, test = (HuggingFaceImages(splits[split], f"{folder}, {split}") for split in (train_split, test_name))
    _check_classes(train, test, folder, train_split, test_name)
    return train, test


def _check_classes(train: ImageSource, test: ImageSource, root: Path, train_name: str, test_name: str) -> None:
    if train.classes != test.classes:
        only_train = listed(sorted(set(train.classes) - set(test.classes)))
        only_test = listed(sorted(set(test.classes) - set(train.classes)))
        raise ValueError(
            f"the splits of {root} must hold the same classes; only in {train_name}: {only_train or 'none'}; "
            f"only in {test_name}: {only_test or 'none'}"
        )

"""Data sets by timm's names: `torch/cifar10`, `hfds/<folder>`, or none for folders and tars of images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from torchvision.datasets import CIFAR10, CIFAR100, Food101, StanfordCars
from torchvision.datasets.utils import calculate_md5

from imixer.data.folders import TEST_FOLDERS, check_folder, find_splits, holds, list_images, listed
from imixer.data.sources import HuggingFaceImages, ImageArrays, ImageFiles, ImagesInTar, ImageSource

# Name -> what torchvision looks for below the root, and how it gets there.
TORCHVISION_LAYOUTS = {
    "cifar10": "cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch and batches.meta: use --download, "
    "or unpack cifar-10-python.tar.gz there",
    "cifar100": "cifar-100-python/ with train, test and meta: use --download, or unpack cifar-100-python.tar.gz there",
    "fashion_mnist": "FashionMNIST/raw/ with its four files: use --download",
    "food101": "food-101/ with images/ and meta/: use --download, or unpack food-101.tar.gz there",
    "imagenet": "train/<wnid>/ and val/<wnid>/ (or ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar) and "
    "ILSVRC2012_devkit_t12.tar.gz, from image-net.org; without the devkit, leave the name torch/imagenet out",
    "kmnist": "KMNIST/raw/ with its four files: use --download",
    "mnist": "MNIST/raw/ with its four files: use --download",
    "stanford_cars": "stanford_cars/ with cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat, which "
    "are no longer where torchvision downloaded them from: get them from a mirror",
}
UNKNOWN_TO_TIMM = {"food101": Food101, "stanford_cars": StanfordCars}
CHECKSUMMED = {"cifar10": CIFAR10, "cifar100": CIFAR100}
FOLDER_NAMES = ("", "folder", "image_folder", "torch/folder", "torch/image_folder")


def load_sources(
    name: str, root: str | Path, *, train_split: str = "train", test_split: str | None = None, download: bool = False
) -> tuple[ImageSource, ImageSource]:
    """Return the training and the test images of a data set.

    Args:
        name: `torch/<name>` for one of `TORCHVISION_LAYOUTS`; `hfds/<name>` for a Hugging Face data set; "" (or
            `folder`) for `train` and `test` (or `val`) below `root`, each a folder of class folders or a tar of those.
        root: The folder that holds the data. Below it is `<name>` of a Hugging Face data set, as `save_to_disk` leaves
            it or as files that `load_dataset` reads; one of the hub is cached there.
        train_split: Name of the training split.
        test_split: Name of the test split; None takes the first of `TEST_FOLDERS` that is there.
        download: Fetch what is missing, from where torchvision gets it or from the Hugging Face hub.

    Raises:
        FileNotFoundError: The data is not there; the message says what was looked for, where, and how to get it.
        NotADirectoryError: `root` is a file.
        ValueError: The name is unknown, a file is damaged, or the splits' classes differ.
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
    if kind == "torch" and rest.lower() in TORCHVISION_LAYOUTS:
        return _torchvision_sources(rest.lower(), root, download)
    known = ", ".join(f"torch/{known}" for known in TORCHVISION_LAYOUTS)
    raise ValueError(
        f"unknown data set {name!r}; known are {known}, hfds/<name>, and no name for a folder of train/ and test/"
    )


def _torchvision_sources(name: str, root: Path, download: bool) -> tuple[ImageSource, ImageSource]:
    if not download:
        check_folder(root)
    try:
        return _torchvision_split(name, root, "train", download), _torchvision_split(name, root, "test", download)
    except ImportError as error:
        raise ImportError(f"torch/{name} needs {error.name}; run: pip install {error.name}") from error
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).replace("download=True", "--download").split()).rstrip(".")
        if name in CHECKSUMMED:
            _check_checksums(CHECKSUMMED[name], root)
        content = holds(root) if root.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"cannot read torch/{name} in {root}, which {content} ({reason}); looked for {TORCHVISION_LAYOUTS[name]}"
        ) from error


def _torchvision_split(name: str, root: Path, split: str, download: bool) -> ImageSource:
    # With str for its loader, a data set of files gives their paths.
    if name in UNKNOWN_TO_TIMM:
        dataset = UNKNOWN_TO_TIMM[name](root, split=split, download=download, loader=str)
    elif name == "imagenet":
        dataset = create_dataset(f"torch/{name}", str(root), "train" if split == "train" else "val", loader=str)
    else:
        return ImageArrays(create_dataset(f"torch/{name}", str(root), split, download=download), root)
    classes = [", ".join(synonyms) if isinstance(synonyms, tuple) else str(synonyms) for synonyms in dataset.classes]
    return ImageFiles([dataset[index] for index in range(len(dataset))], classes)


def _check_checksums(dataset: type[CIFAR10], root: Path) -> None:
    """Raise an error that names a file of CIFAR whose content is not the published one."""
    files = [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]
    for file_name, published in files:
        path = root / dataset.base_folder / file_name
        if path.is_file() and calculate_md5(path) != published:
            raise ValueError(
                f"{path} ({path.stat().st_size} bytes) is damaged or not the published file: its MD5 is "
                f"{calculate_md5(path)}, not {published}; remove it and use --download, or unpack "
                f"{dataset.filename} anew"
            )


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

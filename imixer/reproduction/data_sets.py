"""The data sets that are found in a folder, and the settings of the training that read them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imixer.data import TEST_FOLDERS, TimmTransforms, load_dataset

# What torchvision unpacks below a folder -> its name for timm. The paper's data sets come first.
TORCHVISION_FOLDERS = {
    "cifar-10-batches-py": "cifar10",
    "cifar-100-python": "cifar100",
    "stanford_cars": "stanford_cars",
    "food-101": "food101",
    "FashionMNIST": "fashion_mnist",
}


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set.

    Args:
        name: Short name, for tables and folders.
        reading: Settings of the training that say which images are read, and how.
        data_dir: The folder that holds it; None for scikit-learn's digits.
    """

    name: str
    reading: Mapping[str, Any] = field(default_factory=dict)
    data_dir: str | None = None

    def fingerprint(self) -> dict[str, str | int]:
        """What tells its images from others, wherever they are; see :meth:`imixer.data.ImageData.fingerprint`.

        Raises:
            ValueError, OSError: The images cannot be read.
        """
        if self.data_dir is None:
            return {}
        name = self.reading.get("dataset", "")
        # With transforms images are read when they are asked for.
        found = load_dataset(name, self.data_dir, img_size=32, transforms=TimmTransforms(no_aug=True)).fingerprint()
        del found["name"]  # that of the folder
        return found


DIGITS = DataSet(name="digits")


def find_data_sets(root: Path | None) -> list[DataSet]:
    """The data sets in a folder, CIFAR-10 first; scikit-learn's digits if there is no folder.

    It finds what torchvision unpacks there, and folders (or tars) ``train`` and ``test`` (or ``val``) of images, in
    the folder itself and one level below.

    Args:
        root: The folder.

    Raises:
        FileNotFoundError: There is no such folder, or no data set in it.
    """
    if root is None:
        return [DIGITS]
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; give the folder that holds the images, or leave it out")
    found = [
        DataSet(name=name, reading={"dataset": f"torch/{name}"}, data_dir=str(root))
        for folder, name in TORCHVISION_FOLDERS.items()
        if (root / folder).is_dir()
    ]
    for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        test = next((name for name in TEST_FOLDERS if holds(folder, name)), None)
        if holds(folder, "train") and test is not None:
            name = "cifar10" if is_cifar10(folder) else folder.resolve().name
            found.append(DataSet(name=name, data_dir=str(folder)))
    by_name = {data.name: data for data in reversed(found)}  # the first of a name stays
    if not by_name:
        raise FileNotFoundError(
            f"there is no data set in {root}: looked for {', '.join(TORCHVISION_FOLDERS)} as torchvision unpacks them, "
            "and for folders train/ and test/ of images, there and one level below"
        )
    return sorted(by_name.values(), key=lambda data: (data.name != "cifar10", data.name))


def holds(folder: Path, split: str) -> bool:
    """Whether a split is there, as a folder or a tar."""
    return (folder / split).is_dir() or (folder / f"{split}.tar").is_file()


def is_cifar10(folder: Path) -> bool:
    """Whether a folder of class folders has the classes of CIFAR-10."""
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    train = folder / "train"
    return train.is_dir() and sorted(path.name for path in train.iterdir() if path.is_dir()) == classes

"""Trees of images, `root/<split>/<class>/<image>`, and what is said when one is not as it should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from imixer.data.sources import ImageFiles

TEST_FOLDERS = ("test", "val", "validation")


def find_splits(root: Path, *, train: str = "train", test: str | None = None) -> tuple[Path, Path]:
    """Return where the training and the test images are below `root`: folders, or tar files.

    Args:
        root: The folder that holds both.
        train: Name of the training split.
        test: Name of the test split; None, and each of `TEST_FOLDERS`, take the first of these that is there.

    Raises:
        FileNotFoundError: `root` or a split is missing.
        NotADirectoryError: `root` is a file.
    """
    check_folder(root)
    train_split = _split(root, train)
    if train_split is None:
        raise FileNotFoundError(f"{root} has no {train}/ folder; it {holds(root)}")
    names: Sequence[str] = (test,) if test else TEST_FOLDERS
    if test in TEST_FOLDERS:
        names = (test, *TEST_FOLDERS)
    for name in names:
        test_split = _split(root, name)
        if test_split is not None:
            return train_split, test_split
    wanted = ", ".join(f"{name}/" for name in dict.fromkeys(names))
    raise FileNotFoundError(f"{root} has no test folder, which may be one of {wanted}; it {holds(root)}")


def check_folder(root: Path) -> None:
    """Raise an error that says what is near if `root` is not a folder."""
    if not root.exists():
        near = root.parent
        while not near.exists():
            near = near.parent
        raise FileNotFoundError(f"data folder {root} does not exist; {near} {holds(near)}")
    if not root.is_dir():
        raise NotADirectoryError(f"data folder {root} is a file; give the folder that holds train/ and test/ (or val/)")


def list_images(split: Path) -> ImageFiles:
    """List a split's classes and images, and check that every class has some."""
    if not any(entry.is_dir() for entry in split.iterdir()):
        raise FileNotFoundError(f"{split} has no class folders; it must hold one per class, and it {holds(split)}")
    folder = ImageFolder(str(split), allow_empty=True)
    counts = Counter(folder.targets)
    empty = [name for index, name in enumerate(folder.classes) if not counts[index]]
    if empty:
        class_folder = split / empty[0]
        raise FileNotFoundError(
            f"class folder {class_folder} has no images (files that end in {', '.join(IMG_EXTENSIONS)}); "
            f"it {holds(class_folder)}" + (f"; so it is with {listed(empty[1:])}" if empty[1:] else "")
        )
    return ImageFiles(folder.samples, folder.classes)


def holds(folder: Path) -> str:
    """Say what a folder holds."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return f"holds {listed(names)}" if names else "is empty"


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Join names, and count those above `limit`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _split(root: Path, name: str) -> Path | None:
    """Return the folder or the tar file of a split."""
    folder, tar = root / name, root / f"{name}.tar"
    if folder.is_dir():
        return folder
    return tar if tar.is_file() else None

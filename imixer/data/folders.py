"""Trees of images, `root/<split>/<class>/<image>`, and what is said when one is not as it should be."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from imixer.data.decoding import SUFFIXES
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
        root = Path(os.path.abspath(root))  # a run may be resumed from another folder than it was started in
        near = root.parent
        while not near.exists():
            near = near.parent
        raise FileNotFoundError(f"data folder {root} does not exist; {near} {holds(near)}")
    if not root.is_dir():
        raise NotADirectoryError(f"data folder {root} is a file; give the folder that holds train/ and test/ (or val/)")


def list_images(split: Path) -> ImageFiles:
    """List a split's classes, which are its folders, and the images in them and in the folders below.

    Names that begin with a dot are left out: those of `.ipynb_checkpoints`, or `._x.png` that macOS adds to archives.

    Raises:
        FileNotFoundError: There is no class, or one without images.
        ValueError: Something named like an image is not a regular file, or a link leads back to a folder above it.
    """
    classes = sorted(entry.name for entry in split.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not classes:
        raise FileNotFoundError(f"{split} has no class folders; it must hold one per class, and it {holds(split)}")
    samples, empty = [], []
    for target, name in enumerate(classes):
        images = sorted(_images_below(str(split / name), above=()))
        samples += [(path, target) for path in images]
        empty += [] if images else [name]
    if empty:
        class_folder = split / empty[0]
        raise FileNotFoundError(
            f"class folder {class_folder} has no images (files that end in {', '.join(SUFFIXES)}); "
            f"it {holds(class_folder)}" + (f"; so it is with {listed(empty[1:])}" if empty[1:] else "")
        )
    return ImageFiles(samples, classes)


def _images_below(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Yield the paths of images; torchvision's `ImageFolder` would follow a loop of links for dozens of rounds."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"{folder} is a link that leads back to a folder above it; remove it")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] == ".":
                continue
            image = entry.name.lower().endswith(SUFFIXES)
            try:
                if image and not entry.is_file():
                    raise ValueError(f"{entry.path} is named like an image but is not a regular file; remove it")
                below = not image and entry.is_dir()
            except OSError as error:  # links that point at each other
                raise ValueError(f"cannot look at {entry.path}: {error.strerror}; remove it") from error
            if image:
                yield entry.path
            elif below:
                yield from _images_below(entry.path, (*above, here))


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

"""Where images come from, one at a time: files, arrays in memory, tars, Hugging Face data sets.

Each source gives the image with a number as an RGB picture with its class, and says for error messages which one it is.
timm's `ImageDataset` does the same for some of them, but leaves out formats and links in tars, and puts the next image
in the place of one that it cannot read.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from PIL import Image

from imixer.data.decoding import SUFFIXES, UnreadableImageError, decode_image, open_image
from imixer.data.fingerprint import digest, spread

Sample: TypeAlias = tuple[Image.Image, int]
# How many images a fingerprint looks at, evenly spaced.
SIZED_FILES = 4096
READ_IMAGES = 256
# Of a tar, from one to the next.
MOST_LINKS = 16


class ImageSource(Protocol):
    """Labelled images that are read one at a time; `source[index]` is an RGB image and its class."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def describe(self, index: int) -> str:
        """Say which image this is, for error messages."""
        ...

    def fingerprint(self) -> str:
        """Return a digest that other images would most likely not have; quick for a million of them."""
        ...


class ImageFiles:
    """Image files.

    Args:
        samples: Path and class of each.
        classes: Class names.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], classes: Sequence[str]) -> None:
        self.samples = samples
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        path, target = self.samples[index]
        return open_image(path), target

    def describe(self, index: int) -> str:
        return self.samples[index][0]

    def fingerprint(self) -> str:
        paths = [path for path, _ in self.samples]
        folder = len(os.path.commonpath([os.path.dirname(min(paths)), os.path.dirname(max(paths))]))
        names = (f"{path[folder:]} {target}" for path, target in self.samples)
        sizes = (
            os.path.getsize(paths[index]) for index in spread(len(paths), SIZED_FILES) if os.path.exists(paths[index])
        )
        return digest(chain(names, sizes))


class ImageArrays:
    """Pictures that a torchvision data set holds in memory, such as CIFAR-10's.

    Args:
        dataset: Gives a PIL image and its class for each index.
        classes: Class names.
        root: Folder it was read from.
    """

    def __init__(self, dataset: Any, classes: Sequence[str], root: Path) -> None:
        self.dataset = dataset
        self.classes = tuple(classes)
        self.root = root

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        image, target = self.dataset[index]
        return image.convert("RGB"), int(target)

    def describe(self, index: int) -> str:
        return f"image {index} of {type(self.dataset).__name__} in {self.root}"

    def fingerprint(self) -> str:
        return _pixels_of_some(self)


class ImageInTar(NamedTuple):
    """Where an image lies in a tar file: the name it has there, its class, its place, and how many bytes it has."""

    name: str
    label: str
    offset: int
    size: int


class ImagesInTar:
    """Images in a tar file, one folder per class, or one tar file per class in it.

    The class is the last folder of an image's name. As in trees of files, names that begin with a dot are left out. The
    bytes are read by their place in the file: an open `tarfile.TarFile`, shared with a worker process, would be moved
    about by both.

    Args:
        path: The tar file.

    Raises:
        ValueError: The file is not a tar, has no images, or something named like one that is no file in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with tarfile.open(path, "r:") as archive:
                found = sorted(_images_of(archive, "", 0), key=lambda image: image.name)
            if not found:
                raise ValueError("it has no images in folders")
        except (tarfile.TarError, ValueError, OSError) as error:
            raise ValueError(
                f"cannot read images from the tar file {path} ({path.stat().st_size} bytes): {error}; it must be an "
                "uncompressed tar with one folder of images per class"
            ) from error
        self.classes = tuple(sorted({image.label for image in found}))
        number = {name: index for index, name in enumerate(self.classes)}
        self.samples = [(image, number[image.label]) for image in found]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        image, target = self.samples[index]
        try:
            with self.path.open("rb") as file:
                file.seek(image.offset)
                # A size from a damaged header could ask for more memory than there is.
                content = file.read(min(image.size, os.fstat(file.fileno()).st_size))
        except OSError as error:
            raise UnreadableImageError(f"cannot read image {self.describe(index)}: {error}") from error
        return decode_image(content, self.describe(index)), target

    def describe(self, index: int) -> str:
        return f"{self.samples[index][0].name} in {self.path}"

    def fingerprint(self) -> str:
        names = (f"{image.name} {image.size}" for image, _ in self.samples)
        return digest(chain(names, (target for _, target in self.samples)))


def _images_of(archive: tarfile.TarFile, folder: str, start: int) -> Iterator[ImageInTar]:
    """Yield the images of a tar that begins at a byte of the file, and lies in a folder of the one around it."""
    members = {posixpath.normpath(member.name): member for member in archive}  # the last of those with one name
    for path, member in members.items():
        name = posixpath.join(folder, path)
        if member.isdir() or any(part[0] == "." for part in path.split("/")):
            continue
        if path.lower().endswith(".tar") and not folder:
            inner = _followed(path, members)
            with tarfile.open(fileobj=archive.extractfile(inner), mode="r:") as inside:
                yield from _images_of(inside, path[: -len(".tar")], inner.offset_data)
        elif path.lower().endswith(SUFFIXES) and "/" in name:
            image = _followed(path, members)
            yield ImageInTar(name, name.split("/")[-2], start + image.offset_data, image.size)


def _followed(path: str, members: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """Return the file of a tar that has a name, or to which a link of that name leads."""
    at = path
    for _ in range(MOST_LINKS):
        member = members.get(at)
        if member is None or not (member.issym() or member.islnk()):
            break
        at = posixpath.join(posixpath.dirname(at), member.linkname) if member.issym() else member.linkname
        at = posixpath.normpath(at)
    if member is None or not member.isreg() or member.sparse is not None:
        raise ValueError(f"{path} is no file in it, and no link to one; remove it")
    return member


class HuggingFaceImages:
    """One split of a data set of the `datasets` package.

    Args:
        dataset: Has one column of type `Image` and one of type `ClassLabel`.
        name: What to call it in error messages.

    Raises:
        ValueError: There is no such column, or more than one.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        import datasets

        self.name = name
        self.image_column = _only_column(dataset.features, datasets.Image, name)
        self.target_column = _only_column(dataset.features, datasets.ClassLabel, name)
        # The encoded bytes rather than a decoded image: the error for broken ones is then ours.
        self.dataset = dataset.cast_column(self.image_column, datasets.Image(decode=False))
        self.classes = tuple(dataset.features[self.target_column].names)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        row = self.dataset[index]
        content, target = row[self.image_column], row[self.target_column]
        if content["bytes"] is None and content["path"] is not None:
            return open_image(content["path"]), target
        return decode_image(content["bytes"] or b"", self.describe(index)), target

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def fingerprint(self) -> str:
        return _pixels_of_some(self)


def _pixels_of_some(source: ImageSource) -> str:
    samples = [source[index] for index in spread(len(source), READ_IMAGES)]
    sizes_and_targets = ((image.size, target) for image, target in samples)
    return digest(chain([len(source)], sizes_and_targets, (image.tobytes() for image, _ in samples)))


def _only_column(features: Mapping[str, Any], kind: type, name: str) -> str:
    columns = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(columns) != 1:
        raise ValueError(
            f"{name} must have one column of type {kind.__name__}, and has {len(columns)}; its columns are "
            + ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
        )
    return columns[0]

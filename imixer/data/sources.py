"""Where images come from, one at a time: files, arrays in memory, tars, Hugging Face data sets.

Each source gives the image with a number as an RGB picture with its class, and says for error messages which one it is.
timm's `ImageDataset` does the same for some of them, but puts the next image in the place of one that it cannot read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from PIL import Image
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from imixer.data.decoding import UnreadableImageError, decode_image, open_image
from imixer.data.fingerprint import digest, spread

Sample: TypeAlias = tuple[Image.Image, int]
# How many images a fingerprint looks at, evenly spaced.
SIZED_FILES = 4096
READ_IMAGES = 256


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


class ImagesInTar:
    """Images in a tar file, one folder per class, which timm's reader lists.

    The bytes are read by their place in the file: an open `tarfile.TarFile`, shared with a worker process, would be
    moved about by both.

    Args:
        path: The tar file.

    Raises:
        ValueError: The file is not a tar, or has no images.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = ReaderImageInTar(str(path), cache_tarinfo=False)
        except Exception as error:  # tarfile's errors, or that of unpacking an empty list
            raise ValueError(
                f"cannot read images from the tar file {path} ({path.stat().st_size} bytes): {error}; it must be an "
                "uncompressed tar with one folder of images per class"
            ) from error
        every = zip(reader.samples, reader.targets, strict=True)
        seen = [(sample, target) for sample, target in every if os.path.basename(sample[0].name)[0] != "."]
        self.samples, self.targets = [sample for sample, _ in seen], [target for _, target in seen]
        self.classes = tuple(reader.class_name_to_idx)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        member, _, inner_tar = self.samples[index]
        try:
            with self.path.open("rb") as file:
                file.seek(member.offset_data + (inner_tar.offset_data if inner_tar is not None else 0))
                # A size from a damaged header could ask for more memory than there is.
                content = file.read(min(member.size, os.fstat(file.fileno()).st_size))
        except OSError as error:
            raise UnreadableImageError(f"cannot read image {self.describe(index)}: {error}") from error
        return decode_image(content, self.describe(index)), int(self.targets[index])

    def describe(self, index: int) -> str:
        return f"{self.samples[index][0].name} in {self.path}"

    def fingerprint(self) -> str:
        members = (f"{member.name} {member.size}" for member, *_ in self.samples)
        return digest(chain(members, map(int, self.targets)))


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

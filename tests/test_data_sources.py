"""Data sets by timm's names: what is read from each format, and what is said when it is not there or damaged."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_images import write_digit_tree
from image_archives import (
    CIFARS,
    checksums,
    digit_pictures,
    pack,
    png_bytes,
    write_cifar,
    write_food101,
    write_imagenet,
    write_stanford_cars,
)

from imixer.data import (
    InMemoryImages,
    TimmTransforms,
    TransformedImages,
    UnreadableImageError,
    load_dataset,
    load_sources,
    make_loader,
)

PAPER = TimmTransforms(aa="rand-m9-mstd0.5-inc1", reprob=0.25)


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Path, np.ndarray]:
    """The name, the root and the pictures of a small CIFAR that torchvision takes for the published one."""
    pictures = write_cifar(tmp_path, request.param)
    for attribute, value in checksums(tmp_path, request.param).items():
        monkeypatch.setattr(CIFARS[request.param], attribute, value)
    return request.param, tmp_path, pictures


def test_cifar_is_read_into_memory_once(cifar: tuple[str, Path, np.ndarray]) -> None:
    name, root, pictures = cifar
    data = load_dataset(f"torch/{name}", root, img_size=32)
    assert isinstance(data.train, InMemoryImages)
    assert isinstance(data.test, InMemoryImages)
    found = torch.cat([data.train.images, data.test.images])
    assert torch.equal(found, torch.from_numpy(pictures).permute(0, 3, 1, 2))
    assert torch.cat([data.train.targets, data.test.targets]).tolist() == digit_pictures(70)[1]
    assert data.classes == tuple(f"class {index}" for index in range(10 if name == "cifar10" else 100))
    assert data.name == name
    assert data.description.startswith(f"torch/{name} in {root}: 50 training and 20 test images")


def test_cifar_under_timms_transforms(cifar: tuple[str, Path, np.ndarray]) -> None:
    name, root, _ = cifar
    data = load_dataset(f"torch/{name}", root, img_size=48, transforms=PAPER, test_split="validation")
    assert isinstance(data.train, TransformedImages)
    assert (data.mean, data.std) == ((0.5,) * 3, (0.5,) * 3)
    images, targets = next(iter(make_loader(data.train, batch_size=16, training=True, workers=1, seed=0)))
    assert images.shape == (16, 3, 48, 48)
    assert targets.dtype == torch.int64
    assert data.test.describe(3) == f"image 3 of {CIFARS[name].__name__} in {root}"


@pytest.mark.parametrize(
    "damage", [lambda content: content[:100], lambda content: content[:-1] + b"x"], ids=["cut", "changed"]
)
def test_damaged_pickle_is_named(cifar: tuple[str, Path, np.ndarray], damage: Callable[[bytes], bytes]) -> None:
    name, root, _ = cifar
    for file_name in (CIFARS[name].test_list[0][0], CIFARS[name].meta["filename"]):
        path = root / CIFARS[name].base_folder / file_name
        content = path.read_bytes()
        path.write_bytes(damage(content))
        size = len(damage(content))
        with pytest.raises(FileNotFoundError, match=rf"{file_name}, {size} bytes, is damaged: it has another checksum"):
            load_dataset(f"torch/{name}", root, img_size=32)
        path.write_bytes(content)


def test_files_of_food101_stanford_cars_and_imagenet(tmp_path: Path) -> None:
    write_food101(tmp_path)
    write_stanford_cars(tmp_path)
    write_imagenet(tmp_path / "imagenet")
    food = load_sources("torch/food101", tmp_path)
    assert food[0].classes == ("apple_pie", "waffles")
    assert [(len(split), [split[index][1] for index in range(len(split))]) for split in food] == [
        (4, [0, 0, 1, 1]),
        (2, [0, 1]),
    ]
    assert food[0].describe(1) == str(tmp_path / "food-101" / "images" / "apple_pie" / "2.jpg")

    cars = load_sources("torch/stanford_cars", tmp_path)
    assert cars[0].classes == ("Audi TT", "BMW M3", "Fiat 500")
    assert [[split[index][1] for index in range(len(split))] for split in cars] == [[0, 1, 2], [0, 1]]

    imagenet = load_sources("torch/imagenet", tmp_path / "imagenet", test_split="validation")
    assert imagenet[0].classes == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    for split in (*food, *cars, *imagenet):
        image, _ = split[0]
        assert (image.mode, image.size) == ("RGB", (32, 32))

    (tmp_path / "food-101" / "images" / "apple_pie" / "2.jpg").write_bytes(b"")
    with pytest.raises(UnreadableImageError, match=r"apple_pie/2\.jpg \(0 bytes\)"):
        load_dataset("torch/food101", tmp_path, img_size=8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", r"corrupted\. You can use --download.* \(.*cifar-10-batches-py/data_batch_1 is missing\)"),
        ("CIFAR100", r"--download to download it \(.*cifar-100-python/train is missing\)"),
        ("fashion_mnist", r"Dataset not found\. You can use --download to download it; folders"),
        ("food101", r"Dataset not found\. You can use --download"),
        ("imagenet", r"ILSVRC2012_devkit_t12\.tar\.gz .*not present.*; folders of train/ and test/ are read without"),
        ("inat", r"not found or corrupted. You can use --download"),
        ("kmnist", r"--download"),
        ("Flowers102", r"Dataset not found or corrupted\. You can use --download"),
        ("qmnist", r"--download"),
        ("stl10", r"corrupted\. You can use --download.* \(.*stl10_binary/train_X.bin is missing\)"),
        ("stanford_cars", r"Dataset not found"),
    ],
)
def test_what_is_not_there_is_asked_for(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=rf"cannot read torch/{name} in .* which holds notes\.txt: .*{message}"):
        load_dataset(f"torch/{name}", tmp_path, img_size=8, test_split="validation")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_dataset(f"torch/{name}", tmp_path / "nowhere", img_size=8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eurosat", "cannot use torch/eurosat, split train: it has no training and test split"),
        ("OxfordIIITPet", "cannot use torch/OxfordIIITPet, split train: Unknown value 'train' for argument split"),
        ("fakedata", "cannot use torch/fakedata, split train: "),
        ("cifar11", r"torchvision has no data set 'cifar11'; did you mean cifar10[0 ]"),
    ],
)
def test_data_sets_that_cannot_be_used_say_why(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(f"torch/{name}", tmp_path, img_size=8)


def test_data_set_that_opens_its_files_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sketches:
        def __init__(self, root: str, split: str) -> None:
            self.classes = ("a", "b")

    monkeypatch.setattr("torchvision.datasets.Food101", Sketches)
    with pytest.raises(ValueError, match="cannot use torch/food101: torchvision opens its files itself; unpack it"):
        load_dataset("torch/food101", tmp_path, img_size=8)


def test_data_sets_unknown_to_timm_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    splits = {split: ["", f"{split}_32x32.mat", None] for split in ("train", "test")}
    monkeypatch.setattr("torchvision.datasets.SVHN.split_list", splits)
    pictures, targets = digit_pictures(6)
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pictures.transpose(1, 2, 3, 0), "y": np.array(targets)[:, None]})
    data = load_dataset("torch/svhn", tmp_path, img_size=32, test_split="validation")
    assert isinstance(data.train, InMemoryImages)
    assert torch.equal(data.train.images, torch.from_numpy(pictures).permute(0, 3, 1, 2))
    assert data.classes == tuple("012345")


def test_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(FileNotFoundError, match=r"new, which does not exist: no network \(.*cifar-10.* is missing"):
        load_dataset("torch/cifar10", tmp_path / "new", img_size=8, download=True)
    with pytest.raises(ValueError, match="cannot use torch/stanford_cars, split train: .* cannot be downloaded"):
        load_dataset("torch/stanford_cars", tmp_path, img_size=8, download=True)


def test_unknown_kind_of_name(tmp_path: Path) -> None:
    for name in ("cifar10", "tfds/cifar10"):
        with pytest.raises(
            ValueError, match=f"unknown data set '{name}'; give torch/<name> for a data set of torchvis"
        ):
            load_dataset(name, tmp_path, img_size=8)


@pytest.mark.parametrize("workers", [0, 2])
def test_tars_give_what_folders_give(tmp_path: Path, workers: int) -> None:
    write_digit_tree(tmp_path, num_train=6, num_test=3, test="val")
    transforms = TimmTransforms(aa="rand-m9-mstd0.5-inc1")
    folder = load_dataset("", tmp_path, img_size=16, transforms=transforms)
    expected = [folder.train[index] for index in range(18)]
    for split in ("train", "val"):
        pack(tmp_path / split)
    tars = load_dataset("", tmp_path, img_size=16, transforms=transforms, test_split="validation")
    assert tars.classes == ("0", "1", "2")
    assert len(tars.test) == 9
    assert tars.train.describe(7) == f"1/001.png in {tmp_path / 'train.tar'}"
    batches = make_loader(tars.train, batch_size=4, training=False, workers=workers, seed=0)
    found = [sample for images, targets in batches for sample in zip(images, targets, strict=True)]
    for (image, target), (expected_image, expected_target) in zip(found, expected, strict=True):
        assert torch.equal(image, expected_image)
        assert target == expected_target


def test_broken_tars_are_named(tmp_path: Path) -> None:
    write_digit_tree(tmp_path, num_train=6, num_test=3)
    train, test = pack(tmp_path / "train"), pack(tmp_path / "test")
    content = bytearray(train.read_bytes())
    start = content.index(b"\x89PNG", 20_000)
    content[start : start + 40] = bytes(40)
    train.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"cannot read image \d/00\d\.png in .*train\.tar"):
        load_dataset("", tmp_path, img_size=8)
    test.write_bytes(b"no tar" * 200)
    with pytest.raises(
        ValueError, match=r"cannot read images from the tar file .*test\.tar \(1200 bytes\): .*uncompressed tar"
    ):
        load_dataset("", tmp_path, img_size=8)


def test_splits_by_other_names(tmp_path: Path) -> None:
    write_digit_tree(tmp_path, num_train=6, num_test=3, test="held_out")
    (tmp_path / "train").rename(tmp_path / "chosen")
    train, test = load_sources("", tmp_path, train_split="chosen", test_split="held_out")
    assert (len(train), len(test)) == (18, 9)
    with pytest.raises(
        FileNotFoundError, match=r"no test folder, which may be one of other/; it holds chosen/, held_out/"
    ):
        load_sources("", tmp_path, train_split="chosen", test_split="other")


def test_huggingface_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="hfds/ data sets need the package datasets; run: pip install datasets"):
        load_dataset("hfds/digits", tmp_path, img_size=8)


def test_huggingface_data_sets_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pictures, targets = digit_pictures(12, size=8)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=[*"0123456789"])})
    content: list[dict[str, Any]] = [{"bytes": png_bytes(picture), "path": None} for picture in pictures]
    whole = datasets.Dataset.from_dict({"img": content, "label": targets}, features=features)
    splits = datasets.DatasetDict({"train": whole.select(range(8)), "test": whole.select(range(8, 12))})
    splits.save_to_disk(str(tmp_path / "saved"))
    for name, split in splits.items():
        (tmp_path / "parquet").mkdir(exist_ok=True)
        split.to_parquet(str(tmp_path / "parquet" / f"{name}-00000-of-00001.parquet"))
    for name in ("hfds/saved", "hfds/parquet"):
        data = load_dataset(name, tmp_path, img_size=8, test_split="validation")
        assert isinstance(data.train, InMemoryImages)
        assert torch.equal(data.train.images, torch.from_numpy(pictures[:8]).permute(0, 3, 1, 2))
        assert data.train.targets.tolist() == targets[:8]
        assert data.classes == tuple("0123456789")
    data = load_dataset("hfds/saved", tmp_path, img_size=16, transforms=PAPER)
    assert len(list(make_loader(data.train, batch_size=4, training=True, workers=1, seed=0))) == 2
    assert data.train.describe(1) == f"image 1 of {tmp_path / 'saved'}, train"

    with pytest.raises(FileNotFoundError, match=r"no Hugging Face data set other in .* which holds .*parquet/, saved/"):
        load_dataset("hfds/other", tmp_path, img_size=8)
    with pytest.raises(FileNotFoundError, match="must have the splits big and test .*; its splits are test, train"):
        load_dataset("hfds/saved", tmp_path, img_size=8, train_split="big")
    splits.remove_columns("label").save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(
        ValueError, match=r"must have one column of type ClassLabel, and has 0; its columns are img \(Image\)"
    ):
        load_dataset("hfds/bare", tmp_path, img_size=8)
    content[2]["bytes"] = content[2]["bytes"][:50]
    broken = datasets.Dataset.from_dict({"img": content, "label": targets}, features=features)
    datasets.DatasetDict({"train": broken, "test": broken}).save_to_disk(str(tmp_path / "broken"))
    with pytest.raises(UnreadableImageError, match=r"cannot read image image 2 of .*broken, train \(50 bytes\)"):
        load_dataset("hfds/broken", tmp_path, img_size=8)

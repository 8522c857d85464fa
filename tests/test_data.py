"""Images: what is loaded, how it is augmented and batched, and what is said when a folder is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from digit_images import write_digit_tree
from PIL import Image
from torch import Tensor

from imixer.data import ImageData, InMemoryImages, load_digits, load_image_folder, make_loader
from imixer.random_affine import RandomAffine


def pixels(data: ImageData, images: Tensor) -> Tensor:
    """Undo the normalization: values from 0 to 255."""
    mean, std = torch.tensor(data.mean).view(-1, 1, 1), torch.tensor(data.std).view(-1, 1, 1)
    return (images * std + mean) * 255


def test_digits_are_split_evenly_and_always_alike() -> None:
    data, again = load_digits(), load_digits()
    train, test = data.train, data.test
    assert isinstance(train, InMemoryImages)
    assert isinstance(test, InMemoryImages)
    assert train.images.shape == (1297, 1, 8, 8)
    assert test.images.shape == (500, 1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert torch.bincount(test.targets).min() >= 48
    assert isinstance(again.test, InMemoryImages)
    torch.testing.assert_close(test.images, again.test.images)
    rows = {bytes(image.numpy().tobytes()) for image in test.images}
    assert not any(image.numpy().tobytes() in rows for image in train.images)


def test_digits_are_normalized_and_resized() -> None:
    data = load_digits(img_size=16, augment=False)
    images, targets = next(iter(make_loader(data.train, batch_size=1297, training=True, workers=0, seed=0)))
    assert images.shape == (1297, 1, 16, 16)
    assert targets.dtype == torch.int64
    assert abs(images.mean().item()) < 1e-3
    assert abs(images.std().item() - 1) < 1e-3


def test_affine_without_motion_is_the_identity() -> None:
    images = torch.rand(4, 3, 8, 8)
    affine = RandomAffine()
    torch.testing.assert_close(affine(images, affine.draw(4)), images)


def test_affine_mirrors() -> None:
    images = torch.rand(4, 3, 8, 8)
    affine = RandomAffine(hflip=1.0)
    torch.testing.assert_close(affine(images, affine.draw(4)), images.flip(-1))


def test_affine_moves_each_image_by_its_own_whole_pixels() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 1, 8, 8)
    affine = RandomAffine(shift=1 / 4)
    moved = affine(image.expand(64, 1, 8, 8), affine.draw(64))
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    crops = torch.stack([padded[0, :, i : i + 8, j : j + 8] for i in range(5) for j in range(5)])  # (25, 1, 8, 8)
    distance = (moved[:, None] - crops).abs().amax(dim=(2, 3, 4))  # (64, 25)
    assert distance.amin(dim=1).max() < 1e-5
    assert len(distance.argmin(dim=1).unique()) > 5


def test_affine_rotates_about_the_centre() -> None:
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 9, 9)
    image[..., 4, 4] = 1
    affine = RandomAffine(degrees=45)
    moved = affine(image.expand(8, 1, 9, 9), affine.draw(8))
    torch.testing.assert_close(moved[..., 4, 4], torch.ones(8, 1))


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_folder_gives_the_images_in_it(tmp_path: Path, test: str) -> None:
    written = write_digit_tree(tmp_path, test=test)
    data = load_image_folder(tmp_path, img_size=8, augment=False)
    assert data.classes == ("0", "1", "2")
    assert data.in_chans == 3
    images, targets = next(iter(make_loader(data.test, batch_size=24, training=False, workers=0, seed=0)))
    assert targets.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    for channel in pixels(data, images)[10]:
        torch.testing.assert_close(channel, torch.tensor(written[f"{test}/1/002.png"]).float(), atol=1e-3, rtol=0)


def test_images_of_all_formats_are_found_by_their_names(tmp_path: Path) -> None:
    """Those that docs/runs.md lists, whose names may be in capitals."""
    names = ["a.png", "b.GIF", "c.jpg", "d.JPEG", "e.webp", "f.bmp", "g.tif", "h.tiff", "i.ppm", "j.pgm", "k.jfif"]
    for split in ("train", "test"):
        folder = tmp_path / split / "one"
        folder.mkdir(parents=True)
        for name in names:
            Image.new("L" if name == "j.pgm" else "RGB", (8, 8)).save(folder / name)
        (folder / "notes.txt").write_text("no image")
    data = load_image_folder(tmp_path, img_size=8)
    assert len(data.train) == len(data.test) == len(names)


def test_folder_of_test_and_val_tests_on_test(tmp_path: Path) -> None:
    write_digit_tree(tmp_path, test="val", num_test=4)
    write_digit_tree(tmp_path / "more", num_test=2)
    (tmp_path / "more" / "test").rename(tmp_path / "test")
    assert len(load_image_folder(tmp_path, img_size=8).test) == 6


def test_images_of_any_shape_and_mode_come_at_one_size(tmp_path: Path) -> None:
    write_digit_tree(tmp_path)
    Image.new("RGBA", (40, 20), (255, 0, 0, 255)).save(tmp_path / "test" / "0" / "000.png")
    data = load_image_folder(tmp_path, img_size=16)
    image = pixels(data, data.test[0][0])
    assert image.shape == (3, 16, 16)
    torch.testing.assert_close(image[:, 8, 8], torch.tensor([255.0, 0.0, 0.0]), atol=1e-2, rtol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_large_folder_is_read_from_disk(tmp_path: Path, workers: int) -> None:
    write_digit_tree(tmp_path)
    data = load_image_folder(tmp_path, img_size=16, cache_mb=0)
    assert not isinstance(data.train, InMemoryImages)
    loader = make_loader(data.train, batch_size=10, training=True, workers=workers, seed=0)
    shapes = [tuple(images.shape) for images, _ in loader]
    assert shapes == [(10, 3, 16, 16)] * 7
    assert next(iter(make_loader(data.test, batch_size=5, training=False, workers=0, seed=0)))[0].shape[0] == 5


def test_batches_follow_the_seed() -> None:
    data = load_digits()

    def targets(seed: int) -> Tensor:
        loader = make_loader(data.train, batch_size=100, training=True, workers=0, seed=seed)
        assert len(loader) == 12
        return torch.cat([targets for _, targets in loader])

    assert torch.equal(targets(1), targets(1))
    assert not torch.equal(targets(1), targets(2))


def test_fewer_images_than_a_batch_make_one_batch(tmp_path: Path) -> None:
    write_digit_tree(tmp_path, num_train=2)
    data = load_image_folder(tmp_path, img_size=8)
    assert len(make_loader(data.train, batch_size=64, training=True, workers=0, seed=0)) == 1


def changed_pixel(root: Path) -> None:
    path = root / "train" / "1" / "003.png"
    with Image.open(path) as image:
        changed = image.convert("RGB")  # another size of the file, too
    changed.putpixel((3, 3), (9, 9, 9))
    changed.save(path)


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (changed_pixel, {"train_content"}),
        (lambda root: (root / "test/0/003.png").unlink(), {"test_images", "test_content"}),
        (lambda root: (root / "test/0/003.png").rename(root / "test/1/zzz.png"), {"test_content"}),
        (
            lambda root: [(root / split / "2").rename(root / split / "4") for split in ("train", "test")],
            {"classes", "train_content", "test_content"},
        ),
    ],
    ids=["pixel", "gone", "moved", "class"],
)
@pytest.mark.parametrize("cache_mb", [0, 512])
def test_fingerprint_tells_other_images(
    tmp_path: Path, change: Callable[[Path], object], differing: set[str], cache_mb: int
) -> None:
    write_digit_tree(tmp_path / "here")
    before = load_image_folder(tmp_path / "here", img_size=8, cache_mb=cache_mb).fingerprint()
    assert [before["train_images"], before["test_images"]] == [72, 24]
    (tmp_path / "there").mkdir()
    (tmp_path / "here").rename(tmp_path / "there" / "here")
    assert load_image_folder(tmp_path / "there" / "here", img_size=8, cache_mb=cache_mb).fingerprint() == before
    change(tmp_path / "there" / "here")
    after = load_image_folder(tmp_path / "there" / "here", img_size=8, cache_mb=cache_mb).fingerprint()
    if cache_mb:
        differing = differing - ({"train_content", "test_content"} if "classes" in differing else set())
    assert {name for name, value in before.items() if after[name] != value} == differing


def remove(root: Path, name: str) -> None:
    for path in sorted((root / name).rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
    (root / name).rmdir()


def break_image(root: Path) -> None:
    path = root / "train" / "1" / "003.png"
    path.write_bytes(path.read_bytes()[:60])


def no_class_folders(root: Path) -> None:
    remove(root, "train")
    (root / "train").mkdir()
    (root / "train" / "loose.png").touch()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda root: remove(root, "train"), FileNotFoundError, r"has no train/ folder; it holds test/"),
        (
            lambda root: remove(root, "test"),
            FileNotFoundError,
            r"one of test/, val/, validation/; it holds train/",
        ),
        (lambda root: remove(root, "test/2"), ValueError, r"only in train/: 2; only in test/: none"),
        (
            lambda root: (root / "test" / "2").rename(root / "test" / "two"),
            ValueError,
            r"only in train/: 2; only in test/: two",
        ),
        (
            lambda root: [path.rename(path.with_suffix(".txt")) for path in (root / "train" / "1").iterdir()],
            FileNotFoundError,
            r"class folder .*train/1 has no images .*\.png.*it holds 000\.txt, .* and 16 more",
        ),
        (no_class_folders, FileNotFoundError, r"train has no class folders; .* it holds loose\.png"),
        (break_image, ValueError, r"cannot read image .*train/1/003\.png \(60 bytes\)"),
        (
            lambda root: (root / "test" / "0" / "001.png").write_text(""),
            ValueError,
            r"test/0/001\.png \(0 bytes\)",
        ),
    ],
    ids=["train", "test", "class", "renamed", "empty", "loose", "truncated", "zero bytes"],
)
def test_folder_error_says_what_came(
    tmp_path: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    write_digit_tree(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        load_image_folder(tmp_path, img_size=8)


def test_missing_folder_names_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(FileNotFoundError, match=r"cifar/x does not exist; .* holds cifar10/"):
        load_image_folder(tmp_path / "cifar" / "x", img_size=8)
    (tmp_path / "archive.tar").touch()
    with pytest.raises(NotADirectoryError, match=r"archive\.tar is a file"):
        load_image_folder(tmp_path / "archive.tar", img_size=8)


def test_broken_header_is_found_before_reading_from_disk(tmp_path: Path) -> None:
    write_digit_tree(tmp_path)
    (tmp_path / "test" / "0" / "001.png").write_text("no image")
    with pytest.raises(ValueError, match=r"cannot read image .*test/0/001\.png \(8 bytes\)"):
        load_image_folder(tmp_path, img_size=8, cache_mb=0)

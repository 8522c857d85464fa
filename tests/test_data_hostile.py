"""Files that are not what their names say: each is refused with its name, at once, and nothing in it is run."""

from __future__ import annotations

import io
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digit_images import write_digit_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from timm.data import ImageDataset
from torchvision.datasets.folder import default_loader

from imixer.data import TimmTransforms, UnreadableImageError, load_dataset, load_image_folder, load_sources, make_loader
from imixer.data.decoding import FORMATS, decode_image, open_image
from imixer.data.sources import HuggingFaceImages, ImagesInTar

POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
(MARKER) (w) file closefile
showpage
"""


def encoded(image: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    image.save(content, format=kind)
    return content.getvalue()


@pytest.fixture
def no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a Ghostscript would leave if it were started."""
    marker, program = tmp_path / "started", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return marker


def test_postscript_under_an_images_name_is_not_run(tmp_path: Path, no_ghostscript: Path) -> None:
    with pytest.raises(Exception, match=".*"), Image.open(io.BytesIO(POSTSCRIPT)) as image:
        image.load()
    assert no_ghostscript.exists()  # Pillow left to itself starts it
    no_ghostscript.unlink()

    write_digit_tree(tmp_path / "tree")
    (tmp_path / "tree" / "train" / "1" / "003.png").rename(tmp_path / "tree" / "train" / "1" / "003.jpg")
    (tmp_path / "tree" / "train" / "1" / "003.jpg").write_bytes(POSTSCRIPT)
    for cache_mb in (0, 512):
        with pytest.raises(
            UnreadableImageError, match=r"1/003\.jpg \(\d+ bytes\): it is not an image of a known format"
        ):
            load_image_folder(tmp_path / "tree", img_size=8, cache_mb=cache_mb)
    with pytest.raises(UnreadableImageError, match="not an image of a known format"):
        decode_image(POSTSCRIPT, "a tar's member")
    assert not no_ghostscript.exists()


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])  # MPO is a JPEG with more JPEGs behind it
def test_formats_that_are_read(kind: str) -> None:
    pixels = np.full((8, 8, 3), (200, 100, 50), dtype=np.uint8)
    found = np.asarray(decode_image(encoded(Image.fromarray(pixels), kind), "it"))
    assert np.abs(found.astype(int) - pixels).max() <= (12 if kind in ("JPEG", "MPO", "WEBP", "GIF") else 0)


GRAY = np.linspace(0, 65535, 64).round().reshape(8, 8)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves files open
@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_orientation_of_a_photo_is_read_as_torchvision_and_timm_read_it(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    """They leave the pixels as they are stored. Pillow itself turns those of a TIFF."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9)).convert("RGB")
    (tmp_path / "class").mkdir()
    path = tmp_path / "class" / f"photo.{suffix}"
    stored.save(path, exif=exif)
    found = np.asarray(open_image(str(path)))
    assert np.array_equal(found, default_loader(path))
    if suffix in ("jpg", "png"):  # the files that timm looks for
        assert np.array_equal(found, ImageDataset(str(tmp_path))[0][0])
    assert (found.shape == (6, 9, 3)) == (suffix != "tif" or orientation == 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(kind: str) -> None:
    found = np.asarray(decode_image(encoded(Image.fromarray(GRAY.astype(np.uint16)), kind), "it"))
    np.testing.assert_allclose(found, np.repeat(GRAY[..., None] / 257, 3, axis=2), atol=0.51)


def test_sixteen_bits_of_color_are_scaled() -> None:
    # A 16-bit RGB PNG, which Pillow cannot write: one black row, one with red at half of its range.
    rows = [b"\0" + struct.pack(">HHH", *color) * 2 for color in ((0, 0, 0), (32768, 65535, 257))]
    content = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    content.seek(0, io.SEEK_END)
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(rows))),
        (b"IEND", b""),
    ):
        PngImagePlugin.putchunk(content, name, data)
    found = np.asarray(decode_image(content.getvalue(), "it"))
    assert found[:, 0].tolist() == [[0, 0, 0], [128, 255, 1]]


@pytest.mark.parametrize(
    "image",
    [Image.fromarray(GRAY.astype(np.float32)), Image.fromarray(GRAY.astype(np.int32))],
    ids=["float", "32 bits"],
)
def test_pixels_of_unknown_range_are_refused(image: Image.Image) -> None:
    with pytest.raises(UnreadableImageError, match=r"photo\.tif .*mode [IF], of unknown range; convert it to 8 bits"):
        decode_image(encoded(image, "TIFF"), "photo.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.new("L", (8, 8), 255)
    image = image.convert("RGB").convert("CMYK") if mode == "CMYK" else image.convert(mode if mode != "I;16" else "L")
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16))
    found = decode_image(encoded(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"), "it")
    assert found.mode == "RGB"
    assert np.asarray(found).min() >= 254


def test_image_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_digit_tree(tmp_path)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 20)
    for header_only in (False, True):
        with pytest.raises(UnreadableImageError, match=r"0/000\.png .*decompression bomb"):
            open_image(str(tmp_path / "train" / "0" / "000.png"), header_only=header_only)


@pytest.mark.parametrize(
    "error", [struct.error("short"), SyntaxError("broken PNG"), OverflowError(), MemoryError(), KeyError(3), EOFError()]
)
def test_every_error_of_a_decoder_names_the_image(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    content = encoded(Image.new("RGB", (8, 8)), "PNG")

    def fail(image: Image.Image) -> None:
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    reason = str(error) or type(error).__name__
    with pytest.raises(
        UnreadableImageError, match=rf"^cannot read image it \({len(content)} bytes\): {reason}; replace"
    ):
        decode_image(content, "it")


@settings(max_examples=150)
@given(kind=st.sampled_from(FORMATS), data=st.data())
def test_damaged_images_are_read_or_refused(kind: str, data: Any) -> None:
    noise = np.random.default_rng(0).integers(256, size=(24, 24, 3), dtype=np.uint8)
    content = bytearray(encoded(Image.fromarray(noise), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    message = f"cannot read image it ({len(cut)} bytes): "
    try:
        assert decode_image(cut, "it").mode == "RGB"
    except UnreadableImageError as error:
        message = str(error)
    assert message.startswith(f"cannot read image it ({len(cut)} bytes): ")
    assert "\n" not in message


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to("nowhere.png")


def itself(path: Path) -> None:
    path.symlink_to(path)


STRANGE = [fifo, device, folder, dangling, itself]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("strange", STRANGE)
def test_what_is_no_file_is_refused_when_it_is_listed(tmp_path: Path, strange: Callable[[Path], None]) -> None:
    write_digit_tree(tmp_path)
    strange(tmp_path / "train" / "1" / "zzz.png")
    with pytest.raises(ValueError, match=r"train/1/zzz\.png(: Too many levels| is named like an image but is not)"):
        load_image_folder(tmp_path, img_size=8)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("strange", STRANGE)
def test_what_is_no_file_is_refused_when_it_is_read(
    tmp_path: Path, strange: Callable[[Path], None], workers: int
) -> None:
    write_digit_tree(tmp_path, num_train=4, num_test=2)
    data = load_dataset("", tmp_path, img_size=16, transforms=TimmTransforms())
    path = tmp_path / "train" / "1" / "003.png"
    path.unlink()
    strange(path)
    with pytest.raises(UnreadableImageError, match=r"^cannot read image .*train/1/003\.png: .*; replace or remove it$"):
        list(make_loader(data.train, batch_size=4, training=True, workers=workers, seed=0))


@pytest.mark.timeout(30)
def test_loop_of_links_is_refused(tmp_path: Path) -> None:
    write_digit_tree(tmp_path)
    (tmp_path / "train" / "1" / "more").symlink_to(tmp_path / "train", target_is_directory=True)
    with pytest.raises(ValueError, match=r"train/1/more/1/more is a link that leads back|more/1 is a link that leads"):
        load_image_folder(tmp_path, img_size=8)


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    write_digit_tree(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "train" / "2").rename(elsewhere)
    (tmp_path / "train" / "2").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "below").mkdir()
    (elsewhere / "000.png").rename(elsewhere / "below" / "000.PNG")
    (elsewhere / "other.png").symlink_to("001.png")
    (elsewhere / "notes.txt").write_text("no image")
    assert len(load_image_folder(tmp_path, img_size=8).train) == 73


def write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name, info.size = name, 0 if isinstance(content, tarfile.TarInfo) else len(content)
            archive.addfile(info, io.BytesIO(b"" if isinstance(content, tarfile.TarInfo) else content))


def special(kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, link
    return info


@pytest.mark.timeout(60)
def test_only_files_of_a_tar_are_images(tmp_path: Path) -> None:
    png = encoded(Image.new("RGB", (8, 8), (9, 8, 7)), "PNG")
    members: dict[str, bytes | tarfile.TarInfo] = {
        "0/a.png": png,
        "1/b.png": png,
        "1/folder.png": special(tarfile.DIRTYPE),
        "1/../../outside.png": png,
    }
    write_tar(tmp_path / "val.tar", members)
    write_tar(tmp_path / "train.tar", members)
    train, _ = load_sources("", tmp_path)
    assert [train.describe(index).split()[0] for index in range(len(train))] == ["0/a.png", "1/b.png"]
    assert np.asarray(train[1][0])[0, 0].tolist() == [9, 8, 7]

    others = {
        "1/fifo.png": special(tarfile.FIFOTYPE),
        "1/device.png": special(tarfile.CHRTYPE),
        "1/link.png": special(tarfile.SYMTYPE, "/etc/passwd"),
        "1/hard.png": special(tarfile.LNKTYPE, "1/nothing.png"),
        "1/self.png": special(tarfile.SYMTYPE, "self.png"),
        "1/shard.tar": special(tarfile.SYMTYPE, "shard.tar"),
    }
    for name, member in others.items():
        write_tar(tmp_path / "train.tar", members | {name: member})
        with pytest.raises(ValueError, match=f"{name} is no file in it, and no link to one; remove it"):
            load_sources("", tmp_path)

    members["1/c.jpg"] = POSTSCRIPT
    write_tar(tmp_path / "train.tar", members)
    with pytest.raises(UnreadableImageError, match=r"1/c\.jpg in .*train\.tar \(\d+ bytes\): it is not an image of a"):
        load_dataset("", tmp_path, img_size=8)


def test_a_tar_holds_what_its_folder_holds(tmp_path: Path) -> None:
    """Of every format, with links, numbered classes and hidden folders, in the same order."""
    for split in ("train", "val"):
        for i, name in enumerate(("1", "2", "10", ".cache", "ümläut")):
            (tmp_path / split / name).mkdir(parents=True)
            for suffix in (".png", ".JPG", ".jfif", ".gif", ".webp", ".tiff", ".bmp", ".ppm"):
                form = Image.registered_extensions()[suffix.lower()]
                Image.new("RGB", (8, 8), (i, 0, len(suffix))).save(tmp_path / split / name / f"a{suffix}", form)
        os.link(tmp_path / split / "2" / "a.png", tmp_path / split / "1" / "hard.png")
        (tmp_path / split / "10" / "soft.png").symlink_to("../2/a.png")
    folders = load_sources("", tmp_path)
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(tmp_path / split, ".")
        shutil.rmtree(tmp_path / split)
    assert len(folders[0]) == 4 * 8 + 2
    kept = [[(sorted(split.classes)), len(split)] for split in folders]
    tars = load_sources("", tmp_path)
    assert [[list(split.classes), len(split)] for split in tars] == kept
    assert tars[0].classes == folders[0].classes
    red = {tars[0].describe(i).split()[0]: np.asarray(tars[0][i][0])[0, 0, 0] for i in range(len(tars[0]))}
    assert red["1/hard.png"] == red["10/soft.png"] == 1
    assert red["10/a.png"] == 2


def test_tar_that_shrank_or_lies_about_sizes(tmp_path: Path) -> None:
    png = encoded(Image.new("RGB", (8, 8)), "PNG")
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}.tar", {"0/a.png": png, "1/b.png": png})
    train, _ = load_sources("", tmp_path)
    (tmp_path / "train.tar").write_bytes(b"")
    with pytest.raises(UnreadableImageError, match=r"1/b\.png in .*train\.tar \(0 bytes\)"):
        train[1]
    assert isinstance(train, ImagesInTar)
    image, target = train.samples[1]
    train.samples[1] = image._replace(size=2**62), target
    with pytest.raises(UnreadableImageError, match=r"1/b\.png in .*train\.tar \(0 bytes\)"):
        train[1]
    shutil.move(tmp_path / "train.tar", tmp_path / "gone.tar")
    with pytest.raises(UnreadableImageError, match=r"1/b\.png in .*train\.tar: .*No such file"):
        train[1]


def test_huggingface_images_are_decoded_by_the_same_rule(tmp_path: Path, no_ghostscript: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    os.mkfifo(tmp_path / "fifo.png")
    deep = encoded(Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)), "PNG")
    content = [
        {"bytes": deep, "path": None},
        {"bytes": POSTSCRIPT, "path": None},
        {"bytes": None, "path": str(tmp_path / "fifo.png")},
        {"bytes": b"", "path": None},
    ]
    split = datasets.Dataset.from_dict({"img": content, "label": [0, 1, 0, 1]}, features=features)
    train = HuggingFaceImages(split, "images of others")
    assert np.asarray(train[0][0])[0, 0].tolist() == [128, 128, 128]
    with pytest.raises(UnreadableImageError, match=r"image 1 of .*it is not an image of a known format"):
        train[1]
    with pytest.raises(UnreadableImageError, match=r"fifo\.png: it is not a regular file"):
        train[2]
    with pytest.raises(UnreadableImageError, match=r"image 3 of .*\(0 bytes\)"):
        train[3]
    assert not no_ghostscript.exists()

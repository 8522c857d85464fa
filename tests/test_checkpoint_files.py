"""Checkpoint files: every damaged byte is noticed, no code is run, and one is there whenever saving is cut off."""

from __future__ import annotations

import os
import pickle
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_models import Evil, small

from imixer import load_checkpoint as load_weights
from imixer.checkpoint_file import FORMAT, CheckpointError, read_file, serialize
from imixer.training import load_checkpoint
from imixer.training.checkpoints import read_checkpoint, save_checkpoint

SCALE = int(os.environ.get("DAMAGE_CASES", "1"))  # many more of the random cases


def state(epoch: int) -> dict[str, Any]:
    """A small checkpoint that has all it must have."""
    torch.manual_seed(epoch)
    weights = {"head.weight": torch.randn(20, 30), "head.bias": torch.randn(20)}
    rest: dict[str, Any] = {
        "state_dict_ema": None,
        "optimizer": {},
        "scaler": None,
        "progress": {},
        "config": {},
        "environment": {},
    }
    return {"state_dict": weights, **rest, "epoch": epoch}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for epoch in (1, 2):
        save_checkpoint(tmp_path, state(epoch), best=epoch == 1)
    return tmp_path


def test_a_checkpoint_is_a_file_that_torch_and_timm_read(folder: Path) -> None:
    assert read_checkpoint(folder / "last.pt")["epoch"] == 2
    for mmap in (False, True):
        found = torch.load(folder / "last.pt", weights_only=True, mmap=mmap)
        assert torch.equal(found["state_dict"]["head.weight"], state(2)["state_dict"]["head.weight"])
    assert timm.models.load_state_dict(str(folder / "last.pt"))["head.bias"].shape == (20,)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """At random places, everywhere in the directory of the archive, and in the digest."""
    path = tmp_path / "last.pt"
    whole = bytes(serialize(state(1)))
    chance = random.Random(0)
    places = [*range(len(whole) - 700, len(whole)), *range(100), *chance.sample(range(len(whole)), 200 * SCALE)]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"last\.pt \([\d,]+ bytes\) is damaged: ") as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)


def test_every_truncated_or_longer_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    whole = bytes(serialize(state(1)))
    chance = random.Random(0)
    lengths = [*range(60), *range(len(whole) - 200, len(whole)), *chance.sample(range(len(whole)), 100 * SCALE)]
    for content in [*(whole[:length] for length in lengths), whole + b"\0", whole + whole, whole[::-1]]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"last\.pt .*(damaged|no checkpoint)") as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)


@given(content=st.binary(max_size=300), head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"sha256:"]))
def test_arbitrary_bytes_are_refused_in_one_line(
    content: bytes, head: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = torch.nn.Linear(1, 1)
    for name in ("weights.pt", "weights.safetensors"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(head + content)
        with pytest.raises(CheckpointError, match=name) as error:
            load_weights(model, path)
        assert "\n" not in str(error.value)


def test_flipped_bit_in_other_weights_is_noticed_by_their_own_checksums(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(small().state_dict(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: the checksum of \S+ inside is wrong"):
        load_weights(small(), path)


@pytest.mark.parametrize("wrapped", [True, False], ids=["in a checkpoint", "alone"])
def test_no_code_in_a_file_is_run(tmp_path: Path, wrapped: bool) -> None:
    trace, path = tmp_path / "trace", tmp_path / "weights.pt"
    evil = Evil(trace)
    content = {"format": FORMAT, "state_dict": evil} if wrapped else evil
    torch.save(content, path)
    for read in (read_file, read_checkpoint, lambda path: load_weights(small(), path), load_checkpoint):
        with pytest.raises(
            CheckpointError, match=r"weights\.pt .*: it holds something other than .*\(\w+\.system\)$"
        ) as error:
            read(path)
        assert "weights_only" not in str(error.value)  # PyTorch advises to run the code
    path.write_bytes(serialize({"state_dict": evil}))  # a right digest makes it no better
    with pytest.raises(CheckpointError, match="it holds something other than tensors and plain values"):
        load_weights(small(), path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # it would have run


def test_training_runs_no_code_in_its_first_weights(tmp_path: Path) -> None:
    from training_runs import TINY

    from imixer.training import build_model, load_data

    path = tmp_path / "weights.pt"
    torch.save(Evil(tmp_path / "trace"), path)
    config = TINY.__class__(**{**vars(TINY), "initial_checkpoint": str(path)})
    with pytest.raises(CheckpointError, match="it holds something other than tensors and plain values"):
        build_model(config, load_data(TINY))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"holds a list, not a model's weights by their names"),
        (
            {"state_dict": {"head.weight": 1}},
            r"not hold a model's weights by their names: 'head\.weight' is of type int",
        ),
        ({1: torch.zeros(1)}, r"weights by their names: 1 is of type Tensor"),
        ({"epoch": 3, "lr": torch.ones(1)}, r"weights by their names: 'epoch' is of type int"),
        ({"head.weight": torch.zeros(2)}, r"is of another model: it lacks \d+ tensors"),
        ({}, r"is of another model: it lacks \d+ tensors"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        load_weights(small(), tmp_path / "foreign.pt")
    assert "\n" not in str(error.value)


def test_safetensors_are_read_and_damaged_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(small().state_dict(), path)
    load_weights(small(), path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-1], b"\xff" * 8 + whole[8:], whole[:9] + b"x" + whole[10:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors \([\d,]+ bytes\) is damaged or not a safe"):
            load_weights(small(), path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"last\.pt \(0 bytes\) is damaged or no checkpoint: it is cut off, or of another format \(EOFError\)"),
        (b"text\n" * 20, r"last\.pt \(100 bytes\) is damaged or no checkpoint: it is cut off, or of another format"),
        (
            serialize(state(3))[:2000],
            r"last\.pt \(2,000 bytes\) is damaged or no checkpoint: .* failed finding central directory",
        ),
        (pickle.dumps([1, 2]), r"last\.pt \(\d+ bytes\) is damaged or no checkpoint: it holds something other than"),
        ([1, 2], r"last\.pt is no checkpoint of a training run \(it holds list\)"),
        (Path.mkdir, r"last\.pt is a folder, not a checkpoint"),
        (os.mkfifo, r"last\.pt is a pipe or a device, not a checkpoint"),
        (b"not a checkpoint", r"last\.pt \(16 bytes\) is damaged or no checkpoint: it holds something other than"),
        ({"head.weight": torch.zeros(2)}, r"last\.pt is no checkpoint of a training run \(it holds head\.weight\)"),
        ({"format": "imixer.training/1"}, r"no checkpoint of a training run \(of the format 'imixer.training/1'\)"),
        ({"format": FORMAT}, r"last\.pt \([\d,]+ bytes\) is damaged: the digest at its end is missing"),
        ({"epoch": 3}, r"last\.pt is no whole checkpoint of a training run: it lacks state_dict, state_dict_ema, "),
        ({**state(3), "progress": None}, r"no whole checkpoint of a training run: it lacks progress"),
    ],
    ids=[
        "empty",
        "lines",
        "cut",
        "pickle",
        "list",
        "folder",
        "pipe",
        "text",
        "weights",
        "older",
        "without digest",
        "not whole",
        "no progress",
    ],
)
def test_unfit_checkpoint_is_refused_and_the_one_before_used(folder: Path, content: Any, reason: str) -> None:
    def spoil(path: Path) -> None:
        path.unlink()
        if callable(content):
            content(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif "epoch" in content:
            path.write_bytes(serialize(content))
        else:
            torch.save(content, path)

    spoil(folder / "last.pt")
    with pytest.raises(CheckpointError, match=reason) as error:
        read_checkpoint(folder / "last.pt")
    assert "\n" not in str(error.value)
    for path in (folder, folder / "last.pt"):
        said: list[str] = []
        checkpoint, source = load_checkpoint(path, said.append)
        assert (checkpoint["epoch"], source) == (1, folder / "previous.pt")
        assert said == [f"{error.value}; continuing from {folder}/previous.pt instead"]
    spoil(folder / "previous.pt")
    with pytest.raises(CheckpointError, match=f"{reason}.*; .*previous"):
        load_checkpoint(folder)


def test_folder_in_the_place_of_weights_is_named(folder: Path) -> None:
    message = f"There is no checkpoint file '{folder}', which is a folder; give a file in it, such as best.pt"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        load_weights(small(), folder)


def test_file_that_cannot_be_read_is_not_called_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the last checkpoint would be set aside for a fault of the network."""
    opened = Path.open

    def failing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "last.pt":
            raise OSError(5, "Input/output error", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(OSError, match="Input/output error"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["previous.pt", "best.pt"])
def test_named_checkpoint_is_read_itself_and_nothing_takes_its_place(folder: Path, name: str) -> None:
    checkpoint, source = load_checkpoint(folder / name, pytest.fail)
    assert (checkpoint["epoch"], source) == (1, folder / name)
    (folder / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{name} .0 bytes. is damaged"):
        load_checkpoint(folder / name, pytest.fail)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", r"there is no run or checkpoint at .*nowhere; give a run's folder, or its last\.pt"),
        (".", r"holds no checkpoint \(last\.pt or previous\.pt\); it holds curves\.csv"),
    ],
)
def test_missing_checkpoint_is_reported(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "curves.csv").touch()
    with pytest.raises(FileNotFoundError, match=message):
        load_checkpoint(tmp_path / path)


def test_best_is_the_same_file_or_a_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_checkpoint(folder / "best.pt")["epoch"] == 1  # epoch 2 was not better
    save_checkpoint(folder, state(3), best=True)
    assert (folder / "best.pt").samefile(folder / "last.pt")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    save_checkpoint(folder, state(4), best=True)
    assert not (folder / "best.pt").samefile(folder / "last.pt")
    assert [read_checkpoint(folder / name)["epoch"] for name in ("best.pt", "last.pt", "previous.pt")] == [4, 4, 3]
    assert not list(folder.glob(".*.tmp"))


def test_folder_that_became_read_only_keeps_its_checkpoints(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # whom permissions do not stop
        opened = Path.open

        def refuse(path: Path, mode: str = "r", *arguments: Any) -> Any:
            if "w" in mode:
                raise PermissionError(13, "Permission denied")
            return opened(path, mode, *arguments)

        monkeypatch.setattr(Path, "open", refuse)
    folder.chmod(0o500)
    try:
        with pytest.raises(OSError, match="Permission denied.*; last.pt, previous.pt of before is there still"):
            save_checkpoint(folder, state(3))
    finally:
        folder.chmod(0o700)
        monkeypatch.undo()
    assert load_checkpoint(folder)[0]["epoch"] == 2
    assert read_checkpoint(folder / "previous.pt")["epoch"] == 1


class KilledError(BaseException):
    pass


def test_a_checkpoint_is_there_whenever_saving_is_cut_off(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each call of the operating system that changes a folder or waits for the disk, in turn."""
    calls = ("fsync", "replace", "link")
    originals = {name: getattr(os, name) for name in calls}
    for number in range(100):
        folder = tmp_path_factory.mktemp("run")
        for epoch in (1, 2):
            save_checkpoint(folder, state(epoch), best=True)
        done = [0]

        def killed(*arguments: Any, name: str) -> Any:
            if done[0] == number:  # noqa: B023
                raise KilledError
            done[0] += 1  # noqa: B023
            return originals[name](*arguments)

        for name in calls:
            monkeypatch.setattr(os, name, lambda *arguments, name=name: killed(*arguments, name=name))
        try:
            save_checkpoint(folder, state(3), best=True)
            break
        except KilledError:
            pass
        finally:
            monkeypatch.undo()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for path in (folder, folder / "last.pt"):
                assert load_checkpoint(path, pytest.fail)[0]["epoch"] in (2, 3)
            best = read_checkpoint(folder / "best.pt")["epoch"]
            assert best in (2, 3)
            assert best == 3 or load_checkpoint(folder)[0]["epoch"] == 2, "the run goes on and never makes it the best"
        save_checkpoint(folder, state(3), best=True)  # as the resumed run does
        epochs = [read_checkpoint(folder / name)["epoch"] for name in ("last.pt", "best.pt")]
        assert epochs == [3, 3]
    assert number == 7

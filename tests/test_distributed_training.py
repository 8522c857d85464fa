"""Data-parallel training in two processes: the curves of one process at the same global batch."""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from training_runs import TINY, forkserver, free_port, saved

from imixer.training import (
    NonFiniteError,
    TrainingInterruptedError,
    load_checkpoint,
    load_data,
    loop,
    resuming,
    run_folder,
    train,
)
from imixer.training.folder_lock import FolderInUseError, locked
from imixer.training.learner import Learner
from imixer.training.objective import seed_step

PROCESSES = 2
# Not AdamW: it makes whole steps of the rounding errors in the gradients of weights that nothing depends on.
ONE = replace(TINY, num_blocks=2, epochs=2, opt="sgd", lr=0.1, batch_size=64, validation_batch_size=72)
ONE = replace(ONE, clip_grad=0.5, grad_accum_steps=2)
# 500 test images in 7 batches are 35 or 36 to a process.
TWO = replace(ONE, batch_size=32, validation_batch_size=36)
STOPPED_AT = (0, 11)

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.long,
]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run in one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    result = train(replace(ONE, output=str(tmp_path_factory.mktemp("one"))), load_data(ONE), progress=False)
    return {"metrics": [asdict(row) for row in result.metrics], "weights": weights(result.output)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What each of two processes saw of several runs, and the folder that these left."""
    folder = tmp_path_factory.mktemp("two")
    port = free_port()
    processes = [forkserver().Process(target=work, args=(rank, port, folder), daemon=True) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=200)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def work(rank: int, port: int, folder: Path) -> None:
    """Train in one of the processes, as torchrun starts them, in one way after another."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(PROCESSES)}
    torch.set_num_threads(1)
    data = load_data(TWO)
    seen: dict[str, Any] = {}
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(out),
        pytest.MonkeyPatch.context() as patch,
    ):
        if rank == 1:
            for module, name in ((loop, "save_checkpoint"), (loop, "write_results"), (resuming, "prepare_folder")):
                patch.setattr(module, name, lambda *_, **__: pytest.fail("the second process writes"))
        result = train(replace(TWO, output=str(folder / "parallel")), data)
    seen["parallel"] = {"metrics": [asdict(row) for row in result.metrics], "state": result.model.state_dict()}
    seen["printed"] = out.getvalue()
    batch_norms = replace(TWO, norm="batch", epochs=1, output=str(folder / "batch norms"))
    seen["batch norms"] = train(batch_norms, data, progress=False).model.state_dict()

    def signalled(*place: int) -> None:
        if rank == 1 and place[1:3] == STOPPED_AT:
            os.kill(os.getpid(), signal.SIGTERM)
        seed_step(*place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imixer.training.loop.seed_step", signalled)
        with pytest.raises(TrainingInterruptedError) as stopped:
            train(replace(TWO, output=str(folder / "stopped")), data, progress=False)
    seen["stopped"] = (str(stopped.value), stopped.value.signal_number)
    train(replace(TWO, output=str(folder / "moved")), data, resume=folder / "stopped", progress=False)

    with contextlib.ExitStack() as others:
        if rank == 0:
            others.enter_context(locked(folder / "parallel"))
        with pytest.raises(FolderInUseError) as in_use:
            train(replace(TWO, epochs=3), data, resume=folder / "parallel", progress=False)
    seen["in use"] = str(in_use.value)
    with pytest.raises(ValueError, match="holds a run; continue it with --resume"):
        train(replace(TWO, output=str(folder / "parallel")), data, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:  # only there is something written, and both processes hear of it
            patch.setattr(run_folder, "write_json", full_disk)
        with pytest.raises(OSError, match="No space left"):
            train(replace(TWO, output=str(folder / "full")), data, progress=False)

    add_gradient = Learner.add_gradient

    def spoiled(*args: Any, share: float, last: bool) -> None:
        add_gradient(*args, share=share * math.nan if rank == 1 else share, last=last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "add_gradient", spoiled)
        with pytest.raises(NonFiniteError) as error:
            train(replace(TWO, max_nonfinite=3, output=str(folder / "spoiled")), data, progress=False)
    seen["spoiled"] = str(error.value)
    torch.save(seen, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = saved(folder / "last.pt")["state_dict"]
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-3, atol=1e-5), name


def test_curves_are_those_of_one_process(one: dict[str, Any], two: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = two
    for seen in ranks:
        for row, expected in zip(seen["parallel"]["metrics"], one["metrics"], strict=True):
            assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
            assert row["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-5)
            for name in ("lr", "test_top1", "test_top5"):
                assert row[name] == expected[name]
    assert one["metrics"][1]["train_loss"] < one["metrics"][0]["train_loss"]
    assert_close(weights(folder / "parallel"), one["weights"])


def test_singular_vectors_and_weights_are_equal_in_all_processes(two: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (seen["parallel"]["state"] for seen in two[1])
    assert any(name.endswith("weight.0.u") for name in first)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_statistics_of_batch_normalizations_are_those_of_all_processes(two: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (seen["batch norms"] for seen in two[1])
    statistics = [name for name in first if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) == 8
    assert [name for name in statistics if not torch.equal(first[name], second[name])] == []


def test_only_the_first_process_prints_and_writes(two: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = two
    assert second["printed"] == ""
    assert "2 processes on cpu; 32 x 2 x 2 = 128 images to an update" in first["printed"]
    assert first["printed"].count("epoch   2/2") == 1
    assert len(list((folder / "parallel" / "tensorboard").iterdir())) == 1


def test_a_signal_to_one_stops_all_and_the_run_goes_on_in_other_processes(
    one: dict[str, Any], two: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, ranks = two
    assert [seen["stopped"][1] for seen in ranks] == [None, signal.SIGTERM]
    assert {seen["stopped"][0].partition(",")[0] for seen in ranks} == {"stopped in epoch 1 after step 12 of 20"}
    assert load_checkpoint(folder / "stopped")[0]["progress"]["step"] == 12
    # In two processes, and after an epoch in a single one.
    assert_close(weights(folder / "moved"), one["weights"])
    assert load_checkpoint(folder / "moved" / "previous.pt")[0]["epoch"] == 1
    config = replace(ONE, output=str(tmp_path / "alone"))
    result = train(config, load_data(config), resume=folder / "moved" / "previous.pt", progress=False)
    assert_close(weights(result.output), one["weights"])
    assert result.metrics[-1].test_loss == pytest.approx(one["metrics"][-1]["test_loss"], rel=1e-4)


def test_a_gradient_that_is_not_finite_in_one_stops_all(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for seen in two[1]:
        assert "not finite in 3 updates in a row" in seen["spoiled"]
    checkpoint = load_checkpoint(two[0] / "spoiled")[0]
    assert checkpoint["optimizer"] == {}  # no step was taken
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


def test_other_global_batch_says_which_batch_size_to_give(two: tuple[Path, list[dict[str, Any]]]) -> None:
    message = "2 x 64 images to an update, .* would be 2 x 32; to continue it with 1 process, give --batch-size 64"
    with pytest.raises(ValueError, match=message):
        train(TWO, load_data(TWO), resume=two[0] / "parallel", progress=False)


def test_folder_that_is_in_use_stops_all(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for seen in two[1]:
        assert f"{two[0]}/parallel is in use by process " in seen["in use"]

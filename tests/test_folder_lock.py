"""Two runs never write into one folder; a dead one does not keep others out."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import LIVELY, TINY, difference, last_written, saved, start

from imixer.training import load_data, train
from imixer.training.folder_lock import LOCK, FolderInUseError, locked
from imixer.training.run_folder import claimed_new_folder

# It holds the lock, and has forked a process that outlives it.
HOLD = """
import os, sys, time
from pathlib import Path
from imixer.training.folder_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the folder's lock."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, env=environment) as held:
        assert held.stdout is not None
        assert held.stdout.readline() == b"held\n"
        yield held
        held.kill()


@pytest.mark.long
def test_lock_names_its_holder_and_goes_with_it(holder: subprocess.Popen[bytes], tmp_path: Path) -> None:
    pattern = rf"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since 20\d\d-\S+ \S+; wait"
    with pytest.raises(FolderInUseError, match=pattern), locked(tmp_path):
        pass
    with pytest.raises(FolderInUseError, match=pattern):
        train(replace(TINY, output=str(tmp_path)), load_data(TINY), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK]
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK).read_text().startswith(f"process {holder.pid} ")  # a stale file
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} ")
        with (
            pytest.raises(FolderInUseError, match=f"process {os.getpid()} on"),
            locked(tmp_path),
        ):  # of this process too
            pass
    with locked(tmp_path):
        pass


@pytest.mark.long
def test_workers_do_not_hold_it_for_a_killed_process(holder: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """A killed run's worker processes live on for seconds; the run can be resumed at once."""
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives
        with locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_only_one_of_many_gets_it(tmp_path: Path) -> None:
    got, begun, done = [], threading.Barrier(8), threading.Barrier(8)

    def claim() -> None:
        begun.wait()
        try:
            with locked(tmp_path):
                got.append(1)
                done.wait()
        except FolderInUseError:
            done.wait()

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [1]


def test_file_system_without_locks_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.warns(UserWarning, match="has no locks .Function not implemented.*start only one"), locked(tmp_path):
        pass


def test_new_run_without_a_name_goes_beside_one_that_is_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with claimed_new_folder(TINY, "digits") as first, claimed_new_folder(TINY, "digits") as second:
        assert (first, second) == (Path("runs/digits-imixer_ti4_32"), Path("runs/digits-imixer_ti4_32-2"))
    with claimed_new_folder(TINY, "digits") as again:
        assert again == first  # nothing was saved there


def test_live_run_with_a_checkpoint_is_said_to_be_in_use(tmp_path: Path) -> None:
    """As where the same command was started twice, and the other one has saved before this one looks."""
    config = replace(TINY, output=str(tmp_path))
    with claimed_new_folder(config, "digits"):
        (tmp_path / "last.pt").touch()
        with pytest.raises(FolderInUseError, match=f"is in use by process {os.getpid()}"):
            claimed_new_folder(config, "digits").__enter__()
    with pytest.raises(ValueError, match="holds a run"):
        claimed_new_folder(config, "digits").__enter__()


def test_run_that_ended_between_the_looks_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from imixer.training import run_folder

    def locked_late(folder: Path) -> object:
        (folder / "last.pt").touch()
        return locked(folder)

    monkeypatch.setattr(run_folder, "locked", locked_late)
    with (
        pytest.raises(ValueError, match="holds a run; continue it with --resume"),
        claimed_new_folder(replace(TINY, output=str(tmp_path)), "digits"),
    ):
        pass
    with locked(tmp_path):  # and let go of
        pass


@pytest.mark.long
def test_resume_beside_a_live_run_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    config = replace(LIVELY, output=str(tmp_path), checkpoint_interval="2")
    process = start(config)
    while not last_written(tmp_path) and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGSTOP)
    (tmp_path / ".last.pt.1.tmp").write_bytes(b"of the live run")
    data = load_data(config)
    for resume in (tmp_path, tmp_path / "last.pt", None):
        with pytest.raises(FolderInUseError if resume else (FolderInUseError, ValueError)):
            train(config, data, resume=resume, progress=False)
    assert (tmp_path / ".last.pt.1.tmp").exists()
    os.kill(process.pid or 0, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0
    undisturbed = train(replace(LIVELY, output=str(tmp_path / "alone")), data, progress=False).output
    assert difference(saved(tmp_path / "last.pt"), saved(undisturbed / "last.pt")) == []

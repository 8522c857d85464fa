"""Engines that run many trials: in this process, in several, or on a Ray cluster.

All rest on the claim that :func:`imixer.reproduction.run_trial.run_trial` makes. Any number of processes on any number
of machines may run the same list of trials in the same folder: each trial is run once.
"""

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from imixer.reproduction.run_trial import Ending, Task, record_failure, run_trial
from imixer.reproduction.trial import STARTED, folder_of

# Told of each trial that was looked at: its number in the list, and how that ended.
OnEnding = Callable[[int, Ending], None]


def shard(tasks: Sequence[Task], index: int, count: int) -> list[Task]:
    """The tasks of one of several job array elements; together, the shards have every task once.

    Args:
        tasks: All tasks.
        index: Number of the shard, from 1.
        count: Number of shards.

    Raises:
        ValueError: There is no such shard.
    """
    if not 1 <= index <= count:
        raise ValueError(f"shard must be I/N with I from 1 to N, not {index}/{count}")
    return list(tasks[index - 1 :: count])


def run_here(tasks: Sequence[Task], output: Path, sweep: str, on_ending: OnEnding) -> None:
    """Run the tasks one after another in this process, until one is interrupted."""
    for number, task in enumerate(tasks):
        with stopping_between_trials() as stop:
            ending = run_trial(task, output, sweep)
        on_ending(number, ending)
        if stop or ending is Ending.INTERRUPTED:
            return


@contextmanager
def stopping_between_trials() -> Iterator[list[int]]:
    """Inside, SIGTERM is noted in the list where the training does not handle it itself, as while it measures."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    try:
        before = signal.signal(signal.SIGTERM, receive)
    except ValueError:  # not in the main thread, which alone may handle signals
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def run_in_processes(tasks: Sequence[Task], output: Path, sweep: str, on_ending: OnEnding, *, jobs: int) -> None:
    """Run the tasks in several processes of this machine, which share its cores.

    Every process goes through the whole list, and skips what another one has claimed. If one is killed, the others go
    on, and its trial is reported as failed. Stopping this process stops the others, each after a checkpoint.

    Args:
        tasks: The tasks.
        output: Folder of all trials.
        sweep: Identifier of the sweep.
        on_ending: Told of every trial.
        jobs: Number of processes.

    Raises:
        ChildProcessError: A process died that was not at a trial.
    """
    context = multiprocessing.get_context("spawn")
    endings: Any = context.Queue()
    threads = max(len(os.sched_getaffinity(0)) // jobs, 1) if hasattr(os, "sched_getaffinity") else 1
    processes: list[BaseProcess] = [
        context.Process(target=_work, args=(tasks, output, sweep, endings, threads, first), daemon=True)
        for first in range(jobs)
    ]
    with _terminating(processes):
        for process in processes:
            process.start()
        alive, accident = list(processes), ""
        while alive:
            try:
                while True:
                    on_ending(*endings.get(timeout=0.2))
            except queue.Empty:
                pass
            ended = [process for process in alive if not process.is_alive()]
            alive = [process for process in alive if process not in ended]
            for process in ended:
                if process.exitcode and process.exitcode != -signal.SIGTERM:
                    accident = _report_death(process, tasks, output, sweep, on_ending) or accident
        while not endings.empty():
            on_ending(*endings.get(timeout=1))
    if accident:
        raise ChildProcessError(accident)


def _work(tasks: Sequence[Task], output: Path, sweep: str, endings: Any, threads: int, first: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process passes on what the terminal sends to all
    torch.set_num_threads(threads)
    # Processes start at different trials, so that they do not all try to claim the same ones.
    order = [(first + offset) % len(tasks) for offset in range(len(tasks))]
    run_here([tasks[i] for i in order], output, sweep, lambda number, ending: endings.put((order[number], ending)))


def _report_death(process: BaseProcess, tasks: Sequence[Task], output: Path, sweep: str, on_ending: OnEnding) -> str:
    """Find the trial that a process was at when it died, and note that it failed; else return what happened."""
    code = process.exitcode or 0
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    for number, task in enumerate(tasks):
        folder = folder_of(task.trial, output)
        started = folder.read_sound(STARTED)
        if started is None or (started["sweep"], started["pid"]) != (sweep, process.pid):
            continue
        if task.missing(output) and not folder.failed_in(sweep):
            record_failure(folder, sweep, f"its process ended with {how}; too little memory?")
            on_ending(number, Ending.FAILED)
            return ""
    return f"a process ended with {how}, and not in a trial; the same command goes on from here"


@contextmanager
def _terminating(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Pass SIGTERM and SIGINT on to the processes, and wait for them."""

    def stop(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.pid is not None and process.is_alive():
                process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            if process.pid is not None:
                process.join()


def run_on_ray(
    tasks: Sequence[Task],
    output: Path,
    sweep: str,
    on_ending: OnEnding,
    *,
    cpus: float,
    gpus: float,
    address: str | None = None,
) -> None:
    """Run the tasks on a Ray cluster, or on one that is started on this machine if none is there.

    Every machine has to see ``output`` and the images under the same paths.

    Args:
        tasks: The tasks.
        output: Folder of all trials.
        sweep: Identifier of the sweep.
        on_ending: Told of every trial.
        cpus: CPU cores of a trial.
        gpus: GPUs of a trial, or a part of one.
        address: The cluster's; None for the one that Ray finds, or else starts.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ImportError("the engine ray needs Ray; run: pip install 'implicit-layers[sweep]'") from error
    owned = not ray.is_initialized()
    if owned:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    try:
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(_run_with_threads)
        numbers = {
            remote.remote(task, output.resolve(), sweep, max(int(cpus), 1)): number for number, task in enumerate(tasks)
        }
        waiting = list(numbers)
        while waiting:
            done, waiting = ray.wait(waiting, timeout=1.0)
            for reference in done:
                number = numbers[reference]
                try:
                    ending = ray.get(reference)
                except ray.exceptions.RayError as error:  # the worker died, or its machine
                    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    record_failure(folder_of(tasks[number].trial, output), sweep, reason)
                    ending = Ending.FAILED
                on_ending(number, ending)
    finally:
        if owned:
            ray.shutdown()


def _run_with_threads(task: Task, output: Path, sweep: str, threads: int) -> Ending:
    torch.set_num_threads(threads)
    return run_trial(task, output, sweep)

"""Batches of images, in an order that depends on the seed and the epoch alone, read ahead and moved to the device."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import send_to_device
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from imixer.data.decoding import UnreadableImageError
from imixer.data.images import BatchKey, ImageBatch, Images, InMemoryImages, RawBatch
from imixer.data.random_streams import generator_of

POLL_SECONDS = 5.0  # between looks at whether the workers are alive, while a batch is waited for
GRACE_SECONDS = 60  # that a worker goes on for after a SIGTERM


class LoaderError(RuntimeError):
    """A worker process died, or gave no batch for too long; the message says at which image, in one line."""


class EpochBatches(Sampler[BatchKey]):
    """The batches of one process in an epoch.

    Step k of all processes together is the same set of images, in the same order, as one process with a batch of
    `batch_size * world_size` takes; each process has a contiguous piece of it, and no two sizes differ by more than 1.
    In training, images are shuffled and the incomplete batch that they end in is left out, unless it is the only one.
    In a test each image comes once.

    Args:
        num_images: Images in the data set.
        batch_size: Largest number of images in a batch of one process.
        training: Whether the batches are for training.
        seed: Seed of the order.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: A number is out of its range, or a process would have an empty batch.
    """

    def __init__(
        self, num_images: int, *, batch_size: int, training: bool, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"there must be images and a batch size, not {num_images} and {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1, but is {rank} of {world_size}")
        global_batch = batch_size * world_size
        drop_last = training and num_images >= global_batch
        self.num_steps = num_images // global_batch if drop_last else math.ceil(num_images / global_batch)
        self.num_used = self.num_steps * global_batch if drop_last else num_images
        if self.num_used < self.num_steps * world_size:
            raise ValueError(
                f"{num_images} images in batches of {batch_size} leave a batch of one of {world_size} processes "
                "empty; take fewer processes or a larger batch size"
            )
        self.num_images, self.training, self.seed = num_images, training, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Say which epoch the next pass is, and at which batch it starts; those before are not read."""
        if not 0 <= start_batch <= self.num_steps:
            raise ValueError(f"start_batch must be from 0 to {self.num_steps}, not {start_batch}")
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return self.num_steps

    def __iter__(self) -> Iterator[BatchKey]:
        epoch = self.epoch
        order = torch.arange(self.num_images)
        if self.training:
            order = torch.randperm(self.num_images, generator=generator_of("order", self.seed, epoch))
        for step in range(self.start_batch, self.num_steps):
            piece = step * self.world_size + self.rank
            yield BatchKey(order[self._start(piece) : self._start(piece + 1)].tolist(), epoch, self.seed)

    def sizes(self) -> set[int]:
        """Return the numbers of images in a batch that occur, in any process."""
        starts = [self._start(piece) for piece in range(self.num_steps * self.world_size + 1)]
        return {end - start for start, end in pairwise(starts)}

    def _start(self, piece: int) -> int:
        """Where a piece begins if the images that are used are cut into equal ones."""
        return -(-piece * self.num_used // (self.num_steps * self.world_size))


class ImageLoader:
    """Batches of normalized images, with targets, on a device.

    On CUDA, batches are copied as uint8 from pinned memory, and finished there, while the one before is computed with,
    as in timm's `PrefetchLoader`. The random numbers of that one depend on what was drawn before.

    Args:
        dataset: The images.
        sampler: Which images make the batches; its `set_epoch` is called before each pass.
        workers: Processes that read the images; 0 reads them in this one.
        persistent: Whether the workers outlive a pass.
        device: Where the batches are wanted.
        timeout: Seconds after which a batch that does not come is an error.
        mixup: timm's mixup and CutMix; None mixes nothing.
        mixup_off_epoch: First epoch in which `mixup` only smooths the targets; 0 is none.

    Raises:
        UnreadableImageError: An image cannot be read (while iterating).
        LoaderError: A worker died, or gave no batch in time (while iterating).
    """

    def __init__(
        self,
        dataset: Images,
        sampler: EpochBatches,
        *,
        workers: int,
        persistent: bool,
        device: torch.device,
        timeout: float,
        mixup: Mixup | None = None,
        mixup_off_epoch: int = 0,
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.device = device
        self._timeout = timeout
        self._mixup = mixup
        self._mixup_off_epoch = mixup_off_epoch
        # One stream for all passes: PyTorch keeps freed memory apart for each.
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reading = torch.full((workers, 2), -1).share_memory_()  # process id of each worker, image it reads
        self._batches: DataLoader[Any] = DataLoader(
            _WorkerView(dataset, self._reading),
            batch_sampler=sampler,  # type: ignore[arg-type]  # a BatchKey goes to __getitems__ as a list does
            collate_fn=_as_it_is,
            num_workers=workers,
            worker_init_fn=partial(_start_worker, self._reading),
            persistent_workers=persistent and workers > 0,
            pin_memory=device.type == "cuda",
            timeout=min(POLL_SECONDS, timeout) if workers else 0,
            generator=torch.Generator(),  # else each pass would draw from the global one
        )

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[ImageBatch]:
        side = self._side
        if side is None:
            for batch in self._read():
                yield self._finish(batch)
            return
        ahead: ImageBatch | None = None
        for batch in self._read():
            # Memory that the consumer has freed must not be written to before its work on it is done.
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                finished = self._finish(batch)
            if ahead is not None:
                yield ahead
            torch.cuda.current_stream(self.device).wait_stream(side)
            ahead = finished
        if ahead is not None:
            yield ahead

    def _finish(self, batch: RawBatch) -> ImageBatch:
        if self._mixup is not None:
            self._mixup.mixup_enabled = not self._mixup_off_epoch or batch.key.epoch < self._mixup_off_epoch
        return self.dataset.finish(send_to_device(batch, self.device, non_blocking=True), self._mixup)

    def _read(self) -> Iterator[RawBatch]:
        if not self._batches.persistent_workers:
            self._reading.fill_(-1)
        batches = _iterate(self._batches)
        while True:
            batch = self._next(batches)
            if batch is None:
                return
            if isinstance(batch, UnreadableImageError):
                raise UnreadableImageError(*batch.args)  # `raise batch` would be a cycle that keeps the workers alive
            yield batch

    def _next(self, batches: Iterator[Any]) -> Any:
        """Return the next batch, or None at the end."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return next(batches, None)
            except Exception as error:
                if isinstance(error, (OSError, EOFError)):
                    time.sleep(1)  # a process that is killed closes its connections before it counts as dead
                alive = {process.pid for process in multiprocessing.active_children()}
                reading = [(pid, index) for pid, index in self._reading.tolist() if pid >= 0]
                dead = [(pid, index) for pid, index in reading if pid not in alive]
                if dead:
                    images = self._describe(dead)
                    raise LoaderError(
                        f"a loader worker (process {dead[0][0]}) died while it read {images}; if memory or /dev/shm "
                        "ran out, use fewer --workers; --workers 0 reads in the main process"
                    ) from error
                if not (isinstance(error, RuntimeError) and "timed out" in str(error)):
                    raise
                if time.monotonic() >= deadline:
                    raise LoaderError(
                        f"no batch for {self._timeout:g} s, while workers read {self._describe(reading)}; look whether "
                        "the disk answers"
                    ) from error

    def _describe(self, reading: list[tuple[int, int]]) -> str:
        images = [self.dataset.describe(index) for _, index in reading if index >= 0]
        return " and ".join(images) or "no image yet"


class _WorkerView(Dataset[Any]):
    """What the workers see of a data set: reading says which image is next, and errors are passed on as data.

    An exception that a worker raises would arrive with two tracebacks as its message.
    """

    def __init__(self, dataset: Images, reading: Tensor) -> None:
        self.dataset = dataset
        self.reading = reading

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, key: BatchKey) -> RawBatch | UnreadableImageError:
        worker = get_worker_info()
        try:
            if worker is None:
                return self.dataset.read(key)
            reading = self.reading[worker.id].numpy()
            return self.dataset.read(key, lambda index: reading.__setitem__(1, index))
        except UnreadableImageError as error:
            return error


def make_loader(
    dataset: Images,
    *,
    batch_size: int,
    training: bool,
    workers: int | None = None,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    timeout: float = 300.0,
    mixup: Mixup | None = None,
    mixup_off_epoch: int = 0,
) -> ImageLoader:
    """Batch a data set; in training, shuffled anew in each epoch, and without an incomplete last batch.

    `loader.sampler.set_epoch(epoch, start_batch=0)` chooses the epoch, and where in it a pass starts. The images are
    the same for any number of workers and processes.

    Args:
        dataset: What to batch.
        batch_size: Largest number of images in a batch of one process.
        training: Whether the batches are for training.
        workers: Worker processes that read images; None takes `default_workers()`. Images in memory are served without
            any.
        seed: Seed of the order and of the augmentation.
        rank: Number of this process, of `world_size`.
        world_size: Number of processes that share the images.
        device: Where the batches are wanted.
        timeout: Seconds after which a batch that does not come is an error.
        mixup: timm's mixup and CutMix, which mix images of the same batch and make soft targets, (B, classes).
        mixup_off_epoch: First epoch in which `mixup` only smooths the targets; 0 is none.

    Raises:
        ValueError: A number is out of its range, a process would have an empty batch, or `mixup` an odd one.
    """
    sampler = EpochBatches(
        len(dataset), batch_size=batch_size, training=training, seed=seed, rank=rank, world_size=world_size
    )
    odd = [size for size in sampler.sizes() if size % 2]
    if mixup is not None and odd:
        raise ValueError(
            f"mixup and CutMix mix pairs, and {len(dataset)} images in batches of {batch_size}, shared by {world_size} "
            f"processes, leave a batch of {odd[0]}; choose an even batch size of at most {len(dataset) // world_size}"
        )
    return ImageLoader(
        dataset,
        sampler,
        workers=0 if isinstance(dataset, InMemoryImages) else default_workers() if workers is None else workers,
        persistent=training,
        device=torch.device(device),
        timeout=timeout,
        mixup=mixup,
        mixup_off_epoch=mixup_off_epoch,
    )


def default_workers() -> int:
    """Return this process's share of the cores that it may run on, less one for itself, and at least 1.

    `torchrun` and `accelerate launch` say how many processes share a machine, by the variable LOCAL_WORLD_SIZE.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)


def _iterate(batches: DataLoader[Any]) -> Iterator[Any]:
    """Start a pass, without the signal handler that PyTorch sets.

    When a worker dies, that handler raises in the main process, wherever it is: in the middle of an update or of
    writing a checkpoint. Waiting for the next batch finds dead workers too.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(batches)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return iterator


def _start_worker(reading: Tensor, worker: int) -> None:
    # Ctrl-C reaches the workers as well, and so does the SIGTERM of a scheduler that ends a job. The main process may
    # finish its step first, and will end them; one that does not answer ends by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
    reading[worker, 0] = os.getpid()


def _as_it_is(batch: Any) -> Any:
    return batch

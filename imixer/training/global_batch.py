"""Cutting the images of an update into batches of the processes."""


def cut_into_batches(
    global_batch: int, world_size: int, *, at_most: int, batches: int | None = None, even: bool = False
) -> tuple[int, int]:
    """Return the images per batch of each process, and the batches per update.

    Args:
        global_batch: Images per update, of all processes together.
        world_size: Number of processes.
        at_most: Largest number of images per batch.
        batches: Batches per update; None takes as few as suffice.
        even: Whether batches must have an even number of images.

    Raises:
        ValueError: The images cannot be cut so; the message says what to choose.
    """
    share, rest = divmod(global_batch, world_size)
    if rest:
        near = " or ".join(str(images) for images in (share * world_size, (share + 1) * world_size) if images)
        raise ValueError(
            f"global_batch {global_batch} is not a multiple of the {world_size} processes; choose --global-batch {near}"
        )
    steps = batches or -(-share // at_most)
    batch, rest = divmod(share, steps)
    if not rest and 1 <= batch <= at_most and not (even and batch % 2):
        return batch, steps
    fit = [size for size in range(1, share + 1) if share % size == 0 and not (even and size % 2)]
    given = f"{steps} batches" if batches else f"batches of {at_most}"
    raise ValueError(
        f"global_batch {global_batch} gives each of {world_size} processes {share} images per update, which cannot be "
        f"cut into {given}: equal {'even ' if even else ''}batches of at most {at_most} images. Give --batch-size one "
        f"of {', '.join(map(str, fit[-6:])) or 'nothing'}, and leave out --grad-accum-steps"
    )

"""The option ``compile`` of a solve."""


def check_compile(compile: object, *, compact: bool, chunked: bool = False) -> None:
    """Raise unless ``compile`` is a bool that goes with ``compact``, and with a batch in chunks."""
    if not isinstance(compile, bool):
        raise TypeError(f"compile must be True or False, got {compile!r}.")
    if compile and compact:
        raise ValueError(
            "compact=True takes samples out of the batch, and compile=True needs one shape for all steps: leave one of "
            "them out."
        )
    if compile and chunked:
        raise ValueError("chunk_size splits the batch, and compile=True makes one graph of it: leave one of them out.")

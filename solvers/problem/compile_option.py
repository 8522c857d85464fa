"""The option ``compile`` of a solve."""


def check_compile(compile: object, *, compact: bool) -> None:
    """Raise unless ``compile`` is a bool that goes with ``compact``."""
    if not isinstance(compile, bool):
        raise TypeError(f"compile must be True or False, got {compile!r}.")
    if compile and compact:
        raise ValueError(
            "compact=True takes samples out of the batch, and compile=True needs one shape for all steps: leave one of "
            "them out."
        )

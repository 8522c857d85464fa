"""Looking into implicit layers while a model runs."""

from implicit.diagnostics.recording import record_solutions

__all__ = ["record_solutions"]

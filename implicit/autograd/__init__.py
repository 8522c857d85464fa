"""How the solution of a fixed-point problem becomes a function that autograd can differentiate."""

__all__: list[str] = []

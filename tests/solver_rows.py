"""The solvers that tests run through one after the other. A new solver is one new row."""

from solvers import Anderson, Broyden, NewtonKrylov, Picard, Solver

SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "picard damped": Picard(damping=0.7),
    "anderson 1": Anderson(memory=1),
    "anderson 5": Anderson(),
    "anderson 10": Anderson(memory=10),
    "anderson 5 qr": Anderson(least_squares="qr"),
    "anderson 5 damped": Anderson(damping=0.7),
    "broyden": Broyden(),
    "broyden 10": Broyden(memory=10),
    "newton_krylov": NewtonKrylov(),
}

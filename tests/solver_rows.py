"""The solvers that whole test files run through. A new solver is one new row."""

from solvers import Anderson, Auto, Broyden, Newton, NewtonKrylov, Picard, Solver, Squarem

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
    "broyden damped 5": Broyden(damping=0.7, memory=5),
    "broyden bad": Broyden(method="bad"),
    "broyden bad 10": Broyden(method="bad", memory=10),
    "broyden line search": Broyden(line_search=True),
    "squarem": Squarem(),
    "newton": Newton(),
    "newton_krylov": NewtonKrylov(),
    "auto": Auto(),
}

# A step of these is not one call of the map.
CALLS_VARY = {"broyden line search", "newton", "newton_krylov", "auto"}

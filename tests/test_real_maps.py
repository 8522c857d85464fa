"""Maps that people solve in practice: their solutions, and that the automatic solver is never far from the best."""

import functools
import math

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from solvers import Anderson, Auto, Broyden, NewtonKrylov, Picard, Squarem, solve
from solvers.testing import REAL_MAPS

RTOL = 1e-6
OTHERS = [Picard(), Anderson(), Anderson(memory=10), Broyden(), Squarem(), NewtonKrylov()]


@functools.cache
def real_map(name):
    return REAL_MAPS[name](torch.float64)


@functools.cache
def solved(name, solver, max_steps):
    problem = real_map(name)
    return solve(problem.f, problem.z0, solver, rtol=RTOL, atol=0, max_steps=max_steps, on_failure="ignore")


def calls(name, solver, max_steps):
    """Calls of the map until every sample has converged; infinity if one has not."""
    solution = solved(name, solver, max_steps)
    return solution.num_evals if solution.converged.all() else math.inf


@pytest.mark.long
@pytest.mark.parametrize("name", REAL_MAPS)
def test_auto_needs_few_calls(name):
    # A step of Newton's method takes many calls, and a method that needs more steps than these is not the best.
    best = min(calls(name, solver, 20 if isinstance(solver, NewtonKrylov) else 500) for solver in OTHERS)
    assert best < math.inf
    assert calls(name, Auto(), 500) <= 1.5 * best


# The residual is 1e-6 of the state, and the error up to 1 / (1 - rate) times as much.
ERROR = {"poisson": 1e-2, "sinkhorn 0.003": 1e-3}


@pytest.mark.parametrize("name", REAL_MAPS)
def test_auto_finds_the_solution(name):
    assert (real_map(name).error(solved(name, Auto(), 500).value) <= ERROR.get(name, 2e-4)).all()


@pytest.mark.long
@pytest.mark.parametrize("name", REAL_MAPS)
def test_dtypes_and_batch_sizes(name):
    """The map keeps the structure, dtype and shape of its state, and a batch can have any size."""
    for dtype, batch in ((torch.float32, 2), (torch.float64, 1)):
        problem = REAL_MAPS[name](dtype, batch=batch)
        image = problem.f(problem.z0)
        assert tree_map(lambda leaf: (leaf.shape, leaf.dtype), image) == tree_map(
            lambda leaf: (leaf.shape, leaf.dtype), problem.z0
        )
        assert all(leaf.dtype == dtype and len(leaf) == batch for leaf in tree_leaves(image))
        assert problem.solution.shape[0] == batch

"""Another solver after training: only what is named changes, everywhere or nowhere."""

import copy

import pytest
import torch
from small_models import small, trained_somewhat

from imixer import IMLP
from implicit import FixedPointLayer, Implicit, Unrolled, record_solutions
from solvers import Anderson, Broyden, NewtonKrylov, Picard, Status

NAMES = ("solver", "backward", "rtol", "atol", "max_steps")


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, FixedPointLayer)]


def options_of(layer):
    return {name: getattr(layer, name) for name in NAMES}


CHANGES = {
    "n_iter": ({"n_iter": 7}, {"max_steps": 7}),
    "solver": ({"solver": Broyden(memory=3)}, {"solver": Broyden(memory=3)}),
    "name": ({"solver": "anderson"}, {"solver": Anderson()}),
    "rtol": ({"rtol": 1e-3}, {"rtol": 1e-3, "atol": 0.0}),
    "backward": ({"backward": "implicit"}, {"backward": Implicit()}),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize(("given", "expected"), CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("options", [{}, {"hidden_layers": 4}, {"hidden_layers": 3, "hidden_solve": "joint"}])
def test_only_what_is_named_changes(given, expected, options):
    model = small(n_iter=3, **options)
    before = [options_of(layer) for layer in layers_of(model)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.set_solver(**given) is model
    for layer, options_before in zip(layers_of(model), before, strict=True):
        inner_levels = next(name for name, module in model.named_modules() if module is layer).count("inner")
        wanted = {**options_before, **expected}
        if "rtol" in expected:
            wanted["rtol"] = pytest.approx(1e-3 * 0.1**inner_levels)
        assert options_of(layer) == wanted
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_changes_add_up_and_can_be_taken_back():
    model = small(n_iter=3)
    before = options_of(layers_of(model)[0])
    model.set_solver(rtol=1e-3).set_solver(n_iter=40).set_solver(solver="anderson")
    assert options_of(layers_of(model)[1]) == {
        "solver": Anderson(),
        "backward": Unrolled(),
        "rtol": 1e-3,
        "atol": 0.0,
        "max_steps": 40,
    }
    model.set_solver(rtol=None, n_iter=3, solver="picard")
    assert options_of(layers_of(model)[0]) == before
    imlp = IMLP(4)
    assert imlp.set_solver(n_iter=5) is imlp
    assert imlp.fixed_point.max_steps == 5
    assert small(hidden_layers=1).set_solver(n_iter=5).blocks[0].mlp_tokens.options["n_iter"] == 5


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"n_iter": 0}, ValueError, "n_iter must be a positive integer, got 0"),
        ({"n_iter": None}, ValueError, "must be a positive integer, got None"),
        ({"solver": "secant"}, ValueError, "no solver 'secant'"),
        ({"solver": None}, TypeError, "None"),
        ({"rtol": -1.0}, ValueError, "rtol must be a number >= 0 or None"),
        ({"rtol": "1e-3"}, ValueError, "rtol must be a number >= 0 or None, got '1e-3'"),
        ({"backward": "unroled"}, ValueError, "no backward mode 'unroled'"),
        ({"backward": "shine"}, ValueError, "SHINE"),
        ({"solver": NewtonKrylov()}, ValueError, "needs gradients through the steps"),
        ({"max_steps": 3}, TypeError, "max_steps"),
    ],
)
def test_bad_values_are_refused_and_nothing_is_changed(given, error, message):
    model = small(n_iter=3)
    # Fit for the first block, unfit for the second.
    model.blocks[0].mlp_tokens.set_solver(solver="broyden", backward="implicit")
    before = [options_of(layer) for layer in layers_of(model)]
    good = {name: value for name, value in {"n_iter": 9, "rtol": 1e-2}.items() if name not in given}
    with pytest.raises(error, match=message):
        model.set_solver(**good, **given)
    assert [options_of(layer) for layer in layers_of(model)] == before


def test_more_accurate_at_inference():
    """More steps, or a tolerance, bring every solver to the same logits."""
    model = trained_somewhat(small(hidden_layers=3, hidden_solve="joint")).eval()
    x = torch.randn(2, 3, 16, 16)
    as_trained = model(x)
    exact = model.set_solver(n_iter=60)(x)
    assert not torch.allclose(as_trained, exact, atol=1e-4)
    for solver in (Picard(), Anderson(), Broyden()):
        model.set_solver(solver=solver, n_iter=60, rtol=1e-5)
        with torch.no_grad(), record_solutions(model) as record:
            found = model(x)
        assert torch.allclose(found, exact, atol=2e-4)
        assert all((s.status == Status.CONVERGED).all() for solutions in record.values() for s in solutions)
    assert torch.equal(model.set_solver(solver="picard", n_iter=2, rtol=None)(x), as_trained)


def test_after_loading_and_in_copies():
    model = trained_somewhat(small()).eval()
    x = torch.randn(2, 3, 16, 16)
    other = small(n_iter=5).eval()
    other.load_state_dict(model.state_dict())
    duplicate = copy.deepcopy(model).set_solver(n_iter=5)
    assert torch.equal(duplicate(x), other(x))
    assert not torch.equal(duplicate(x), model(x))  # the original is as it was


def test_what_is_compiled_is_compiled_again():
    imlp = IMLP(5, 4).eval()
    x = torch.randn(3, 5)
    compiled = torch.compile(imlp, backend="aot_eager", fullgraph=True)
    outputs = []
    for options in ({}, {"n_iter": 3}, {"solver": Anderson(memory=1)}):
        imlp.set_solver(**options)
        with torch.no_grad():
            outputs.append(compiled(x))
            assert torch.allclose(outputs[-1], imlp(x), atol=1e-6)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-6)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-6)

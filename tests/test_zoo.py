"""The models of examples/zoo have the properties that their papers claim, and exact gradients."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from implicit import FixedPointLayer, Implicit, Unrolled, diagnose
from solvers import Picard, solve

ZOO = Path(__file__).resolve().parent.parent / "examples" / "zoo"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"zoo_{name}", ZOO / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_main(module: ModuleType, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *options.split()])
    module.main()


def largest_gradient_error(layer: FixedPointLayer, x: Tensor, *others: Tensor) -> float:
    """The relative error of the gradient to the first input, beside the implicit function theorem by dense algebra.

    What is differentiated is the product of the state with random numbers.
    """
    layer.rtol, layer.max_steps, layer.backward = 1e-12, 2000, Implicit()
    x = x.detach().requires_grad_()
    z = layer(x, *others)
    leaves, spec = tree_flatten(z)
    sizes = [leaf.numel() for leaf in leaves]
    cotangents = [torch.randn_like(leaf) for leaf in leaves]
    (found,) = torch.autograd.grad(leaves, x, cotangents)

    def flat_map(flat: Tensor, x: Tensor) -> Tensor:
        parts = [part.view_as(leaf) for part, leaf in zip(flat.split(sizes), leaves, strict=True)]
        return torch.cat([leaf.flatten() for leaf in tree_flatten(layer.f(tree_unflatten(parts, spec), x, *others))[0]])

    flat = torch.cat([leaf.detach().flatten() for leaf in leaves])
    assert torch.allclose(flat_map(flat, x.detach()), flat, rtol=1e-9, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda flat: flat_map(flat, x.detach()), flat)
    w = torch.cat([cotangent.flatten() for cotangent in cotangents])
    adjoint = torch.linalg.solve(torch.eye(len(flat)) - jacobian.T, w)
    (exact,) = torch.autograd.grad(flat_map(flat, x), x, adjoint)
    return float((found - exact).norm() / exact.norm())


def spread(layer: FixedPointLayer, *inputs: Tensor) -> float:
    """How far apart the solutions from different starts are, relative to their size."""
    start = layer.start(*inputs)
    scales = (0.0, 1.0, 30.0)
    found = [layer(*inputs, z0=tree_map(lambda part, s=s: s * torch.randn_like(part), start)) for s in scales]
    flat = torch.stack([torch.cat([leaf.flatten() for leaf in tree_flatten(z)[0]]) for z in found])
    return float((flat - flat[0]).norm() / flat[0].norm())


def randomized(module: torch.nn.Module, size: float) -> None:
    """Move the weights somewhere."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))


# The transformer.


def small_transformer() -> tuple[ModuleType, Any, Tensor, int]:
    zoo = load("deq_transformer")
    text, num_characters = zoo.load_text()
    return zoo, zoo.DEQTransformer(num_characters, context=24, width=32, heads=2), text, num_characters


@pytest.mark.long
def test_text_is_long_and_without_repetitions() -> None:
    zoo = load("deq_transformer")
    text, num_characters = zoo.load_text()
    assert len(text) > 200_000
    assert 60 < num_characters <= 128
    # A repeated paragraph in the last tenth would let the model recite.
    assert int(text.max()) == num_characters - 1
    halves = text[: len(text) // 2], text[len(text) // 2 :]
    orders = [zoo.frequency_bits(*halves, num_characters, order) for order in (1, 2, 3)]
    assert orders[0] > orders[1] > orders[2]


@pytest.mark.long
def test_transformer_learns_and_is_solved() -> None:
    zoo, model, text, num_characters = small_transformer()
    training, test = text[:-40_000], text[-40_000:][:3000]
    zoo.train(model, training, steps=120, batch_size=16)
    bits, solution = zoo.evaluate(model, test)
    assert bits < zoo.frequency_bits(training, test, num_characters, order=1) - 0.2
    assert solution.converged.double().mean() > 0.98
    model.equilibrium.rtol = 1e-3  # in training a looser tolerance suffices
    diagnosis = diagnose(model, test[: 8 * 24].view(8, 24))
    assert diagnosis.healthy, str(diagnosis)


def test_transformer_is_causal_and_exact(double: None) -> None:
    _, model, text, _ = small_transformer()
    model.equilibrium.rtol, model.equilibrium.max_steps = 1e-11, 500
    characters = text[:24].view(1, 24)
    changed = characters.clone()
    changed[0, 12:] = text[100:112]
    with torch.no_grad():
        difference = (model(characters) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:12].max() < 1e-8
    assert difference[12:].min() > 1e-4
    assert largest_gradient_error(model.equilibrium, model.injected(characters[:, :6])) < 1e-7


def test_memory_of_the_transformer_does_not_grow_with_its_steps() -> None:
    zoo, model, text, _ = small_transformer()
    characters = text[:24].view(1, 24)
    implicit = [zoo.saved_bytes(model, characters, Implicit(), steps) for steps in (5, 40)]
    unrolled = [zoo.saved_bytes(model, characters, Unrolled(), steps) for steps in (5, 40)]
    assert implicit[0] == implicit[1] < unrolled[0]
    assert unrolled[1] > 6 * unrolled[0]


@pytest.mark.long
def test_transformer_beats_the_frequencies_of_pairs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main(load("deq_transformer"), "--steps 350 --context 32 --test-characters 8000", monkeypatch)
    output = capsys.readouterr().out
    single, pairs, model = (float(bits) for bits in re.findall(r"^  \w.*?  +(\d\.\d\d)$", output, re.MULTILINE))
    assert model < pairs - 0.05 < single - 0.5
    assert float(re.findall(r"^solved ([\d.]+)%", output, re.MULTILINE)[0]) > 98


# The multiscale classifier.


@pytest.mark.long
def test_mdeq_learns_and_is_healthy() -> None:
    zoo = load("mdeq")
    train_images, test_images, train_labels, test_labels = zoo.load_split()
    assert len(test_images) == 450
    model = zoo.MDEQ(channels=8)
    zoo.train(model, train_images[:640], train_labels[:640], epochs=4)
    with torch.no_grad():
        z, solution = model.equilibrium(model.stem(test_images), return_solution=True)
    assert [tuple(part.shape[1:]) for part in z] == [(8, 8, 8), (8, 4, 4), (8, 2, 2)]
    assert (model.classified(z).argmax(dim=1) == test_labels).double().mean() > 0.6
    assert solution.converged.double().mean() > 0.99
    model.equilibrium.rtol = 1e-3  # in training a looser tolerance suffices
    diagnosis = diagnose(model, test_images[:32])
    assert diagnosis.healthy, str(diagnosis)


def test_gradient_of_mdeq_is_exact(double: None) -> None:
    zoo = load("mdeq")
    model = zoo.MDEQ(channels=4)
    image = zoo.load_split()[0][:1].double()
    assert largest_gradient_error(model.equilibrium, model.stem(image)) < 1e-7


@pytest.mark.long
def test_mdeq_reaches_its_accuracy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_main(load("mdeq"), "--epochs 8", monkeypatch)
    output = capsys.readouterr().out
    assert float(re.findall(r"^test accuracy ([\d.]+)%", output, re.MULTILINE)[0]) > 97
    assert int(re.findall(r"^solved (\d+) of 450", output, re.MULTILINE)[0]) > 445


# The monotone operator network.


def monotone_solvers(zoo: ModuleType, f: Any) -> list[Any]:
    forward_backward = [zoo.ForwardBackward(linear=f.linear, m=f.m, share=share) for share in (0.3, 0.9)]
    return forward_backward + [zoo.PeacemanRachford(linear=f.linear, length=length) for length in (0.1, 1.0, 4.0)]


@pytest.mark.parametrize("size", [0.0, 0.1, 0.3])
def test_splitting_converges_to_one_point_for_all_weights(size: float, double: None) -> None:
    zoo = load("monotone_operator_network")
    f = zoo.MonotoneMap(width=12, m=1.0)
    randomized(f, size)
    weight = f.linear.weight.detach()
    least = torch.linalg.eigvalsh(torch.eye(12) - (weight + weight.T) / 2).min()
    assert least > f.m - 1e-9
    x = torch.randn(20, 12)
    with torch.no_grad():
        found = [
            solve(f, scale * torch.randn_like(x), solver, args=(x,), rtol=1e-9, max_steps=20_000, on_failure="raise")
            for solver in monotone_solvers(zoo, f)
            for scale in (0.0, 1.0, 100.0)
        ]
    values = torch.stack([solution.value for solution in found])
    assert (values - values[0]).norm(dim=2).max() < 1e-5 * values[0].norm(dim=1).min()


@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_values_of_splitting_meet_the_tolerance(rtol: float) -> None:
    """Steps of splitting contract where the map expands, so that the image of a solved iterate can miss it."""
    zoo = load("monotone_operator_network")
    for size in (0.1, 0.5):
        f = zoo.MonotoneMap(width=12, m=1.0)
        randomized(f, size)
        x = torch.randn(40, 12)
        with torch.no_grad():
            for solver in monotone_solvers(zoo, f):
                z = solve(f, torch.zeros_like(x), solver, args=(x,), rtol=rtol, atol=0, max_steps=5000).value
                image = f(z, x)
                assert ((image - z).norm(dim=1) <= 1.001 * rtol * image.norm(dim=1)).all()


def test_plain_iteration_of_a_monotone_network_need_not_converge(double: None) -> None:
    zoo = load("monotone_operator_network")
    f = zoo.MonotoneMap(width=12, m=1.0)
    randomized(f, 0.5)
    x = torch.randn(20, 12)
    assert not solve(f, x, Picard(), args=(x,), max_steps=1000, on_failure="ignore").converged.any()


def test_gradient_of_the_monotone_network_is_exact(double: None) -> None:
    zoo = load("monotone_operator_network")
    network = zoo.MonotoneNetwork(width=10)
    randomized(network.map, 0.2)
    assert largest_gradient_error(network.equilibrium, torch.randn(1, 10)) < 1e-7


def test_monotone_network_keeps_its_guarantee_during_training() -> None:
    zoo = load("monotone_operator_network")
    train_images, test_images, train_labels, test_labels = zoo.load_split()
    network = zoo.MonotoneNetwork(width=32)
    for _ in range(2):
        zoo.train(network, train_images, train_labels, epochs=3)
        with torch.no_grad():
            assert spread(network.equilibrium, network.inject(test_images[:50])) < 1e-2
    assert (network(test_images).argmax(dim=1) == test_labels).double().mean() > 0.9
    diagnosis = diagnose(network, test_images[:50])
    assert diagnosis.healthy, str(diagnosis)


@pytest.mark.parametrize(
    ("name", "option", "value"), [("ForwardBackward", "share", 1.0), ("PeacemanRachford", "length", 0)]
)
def test_splitting_refuses_steps_without_a_guarantee(name: str, option: str, value: float) -> None:
    zoo = load("monotone_operator_network")
    linear = zoo.MonotoneMap(width=4, m=1.0).linear
    options = {"linear": linear, option: value} | ({"m": 1.0} if name == "ForwardBackward" else {})
    with pytest.raises(ValueError, match=rf"{name}\({option}=\.\.\.\) must be .*, got {value}"):
        getattr(zoo, name)(**options)


@pytest.mark.long
def test_example_of_the_monotone_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_main(load("monotone_operator_network"), "", monkeypatch)
    output = capsys.readouterr().out
    assert float(re.findall(r"^test accuracy ([\d.]+)%", output, re.MULTILINE)[0]) > 96
    rows = re.findall(r"^ +(\S.*?) +(\d+)% solved, in at most +\d+ steps, (\S+) apart$", output, re.MULTILINE)
    assert len(rows) == 10
    for name, share, apart in rows:
        assert (share == "100") == (name != "plain iteration")
        assert name == "plain iteration" or float(apart) < 1e-3


# The graph network.


def test_implicit_graph_network_sees_to_the_end_of_a_chain() -> None:
    zoo = load("implicit_graph_network")
    adjacency, features, labels = zoo.make_chains(20)
    training, rest = zoo.split(labels, 20)
    accuracy: dict[str, float] = {}
    networks = {"implicit": zoo.ImplicitGraphNetwork(8), "layers": zoo.GraphConvolutions(8, layers=4)}
    for name, network in networks.items():
        zoo.train(network, features, adjacency, labels, training, steps=100)
        accuracy[name] = zoo.accuracy(network, features, adjacency, labels, rest)
    assert accuracy["implicit"] > 0.97
    assert accuracy["layers"] < 0.75
    implicit = networks["implicit"]
    assert implicit.map.weight.abs().sum(dim=0).max() <= implicit.kappa * (1 + 1e-6)
    with torch.no_grad():
        assert spread(implicit.equilibrium, implicit.inject(features), adjacency) < 1e-3
    diagnosis = diagnose(implicit, features, adjacency)
    assert diagnosis.healthy, str(diagnosis)


def test_projected_weights_are_well_posed_and_gradients_exact(double: None) -> None:
    zoo = load("implicit_graph_network")
    network = zoo.ImplicitGraphNetwork(4)
    randomized(network.map, 3.0)
    network.project()
    # A graph that is no chain: random links, with rows that sum to 1.
    adjacency = (torch.rand(15, 15) < 0.3).double()
    adjacency = adjacency / adjacency.sum(dim=1, keepdim=True).clamp_min(1)
    largest = torch.linalg.eigvals(torch.kron(network.map.weight.detach().abs(), adjacency.T.contiguous())).abs().max()
    assert largest <= network.kappa + 1e-9
    u = torch.randn(15, 4)
    with torch.no_grad():
        assert spread(network.equilibrium, u, adjacency) < 1e-3
    assert largest_gradient_error(network.equilibrium, u, adjacency) < 1e-7


@pytest.mark.long
def test_example_of_the_graph_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_main(load("implicit_graph_network"), "--lengths 10 50", monkeypatch)
    rows = re.findall(r"^ +(\d+) +([\d.]+)% +([\d.]+)% +(\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert [int(length) for length, *_ in rows] == [10, 50]
    assert all(float(implicit) > 99 for _, implicit, *_ in rows)
    assert float(rows[1][2]) < 65


# Deblurring.


def test_deblurring_contracts_whatever_its_weights(double: None) -> None:
    zoo = load("deblurring")
    model = zoo.Deblurring(width=16)
    randomized(model.map, 1.0)
    assert 0 < model.contraction() < 1
    x, y = torch.randn(2, 40, 1, 8, 8), torch.randn(40, 1, 8, 8)
    with torch.no_grad():
        ratio = (model.map(x[0], y) - model.map(x[1], y)).flatten(1).norm(dim=1) / (x[0] - x[1]).flatten(1).norm(dim=1)
        assert ratio.max() <= model.contraction()
        model.equilibrium.rtol, model.equilibrium.max_steps = 1e-7, 500
        assert spread(model.equilibrium, y[:5]) < 1e-3
    assert largest_gradient_error(model.equilibrium, y[:1]) < 1e-7


def test_blur_is_a_symmetric_contraction() -> None:
    zoo = load("deblurring")
    matrix = zoo.blur(torch.eye(64).view(64, 1, 8, 8)).view(64, 64)
    assert torch.allclose(matrix, matrix.T, atol=1e-7)
    assert torch.linalg.matrix_norm(matrix, 2) <= 1


@pytest.mark.long
def test_deblurring_restores_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    zoo = load("deblurring")
    run_main(zoo, f"--epochs 3 --output {tmp_path / 'images.png'}", monkeypatch)
    decibels = dict(re.findall(r"^(\w+) +([\d.]+) dB$", capsys.readouterr().out, re.MULTILINE))
    assert float(decibels["equilibrium"]) > float(decibels["blurred"]) + 3
    assert float(decibels["Wiener"]) > float(decibels["Tikhonov"])
    assert (tmp_path / "images.png").read_bytes().startswith(b"\x89PNG")


def test_trained_deblurring_is_healthy() -> None:
    zoo = load("deblurring")
    training, truth = zoo.load_images()
    model = zoo.Deblurring(width=64)
    zoo.train(model, training[:640], epochs=2)
    diagnosis = diagnose(model, zoo.measure(truth[:32]))
    assert diagnosis.healthy, str(diagnosis)


@pytest.mark.long
def test_deblurring_beats_the_linear_filters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    zoo = load("deblurring")
    run_main(zoo, f"--output {tmp_path / 'images.png'}", monkeypatch)
    output = capsys.readouterr().out
    decibels = {name: float(value) for name, value in re.findall(r"^(\w+) +([\d.]+) dB$", output, re.MULTILINE)}
    assert decibels["equilibrium"] > max(decibels["Wiener"], decibels["Tikhonov"])
    assert "solved 450 of 450 images" in output


@pytest.mark.parametrize("name", sorted(path.stem for path in ZOO.glob("*.py")))
def test_every_example_says_how_to_start_it(name: str) -> None:
    source = (ZOO / f"{name}.py").read_text("utf-8")
    assert f"\npython examples/zoo/{name}.py\n" in source
    assert callable(load(name).main)

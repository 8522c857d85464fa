"""What must hold on a CUDA device beyond steps of a model: compiled and exported solves, roots, answers, reports."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compiling_warnings import COMPILING_WARNINGS
from test_gpu import Map, no_waiting
from test_zoo import load
from torch import nn

from implicit import (
    FixedPointLayer,
    audit_gradients,
    diagnose,
    differentiable,
    fixed_point,
    monitor_solves,
    root,
)
from solvers import Anderson, Broyden, NotCompiledWarning, Picard, _compiled, solve

pytestmark = [
    pytest.mark.gpu,
    COMPILING_WARNINGS,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]

cuda = {"device": "cuda", "dtype": torch.float64}


@pytest.fixture(autouse=True)
def _nothing_tried(monkeypatch):
    monkeypatch.setattr(_compiled, "_not_replayed", set())


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=str)
def test_compiled_solves_are_those_step_by_step(solver):
    """With samples that end at different steps, and one that has no fixed point."""
    rate = torch.tensor([0.1, 0.5, 0.9, -0.6, 1.5], **cuda).unsqueeze(1)
    shift = torch.randn(5, 6, **cuda)
    shift[4] = 1.0

    def f(z, rate, shift):
        return rate * torch.sin(z.flip(1)) + shift * (1 + (rate > 1) * z.square())

    options = {"args": (rate, shift), "rtol": 1e-9, "max_steps": 200, "on_failure": "ignore"}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", NotCompiledWarning)
        eager, compiled = (solve(f, torch.zeros_like(shift), solver, compile=c, **options) for c in (False, True))
    assert compiled.value.is_cuda
    assert not _compiled._not_replayed
    assert eager.converged.tolist() == compiled.converged.tolist() == [True] * 4 + [False]
    assert (compiled.num_steps - eager.num_steps)[:4].abs().max() <= 2
    torch.testing.assert_close(compiled.value[:4], eager.value[:4], rtol=1e-7, atol=1e-7)


def compiled_and_not(f, start, *args, **options):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", NotCompiledWarning)
        return [solve(f, start, args=args, compile=compile, **options) for compile in (True, False)]


def test_a_map_that_waits_for_the_device_is_not_captured_and_nothing_is_broken_by_trying():
    def f(z, x):
        return (0.5 * z.cpu()).to(z.device) + x

    x = torch.randn(3, 4, **cuda)
    compiled, eager = compiled_and_not(f, torch.zeros_like(x), x, rtol=1e-9)
    torch.testing.assert_close(compiled.value, eager.value)
    assert len(_compiled._not_replayed) == 1
    state = torch.cuda.get_rng_state()
    numbers = torch.rand(5, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.rand(5, device="cuda").equal(numbers)
    compiled, eager = compiled_and_not(lambda z, x: 0.5 * z + x, torch.zeros_like(x), x, rtol=1e-9)
    torch.testing.assert_close(compiled.value, eager.value)
    assert len(_compiled._not_replayed) == 1


def test_captured_solves_draw_new_numbers_in_every_step_and_leave_the_generator_in_order():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.no_grad():
            solution = solve(
                lambda z: 0.5 * z + torch.rand_like(z),
                torch.zeros(3, 1000, **cuda),
                Picard(),
                compile=True,
                rtol=1e-9,
                max_steps=20,
                on_failure="ignore",
            )
        drawn.append(solution.value)
        torch.rand(5, device="cuda")
    assert drawn[0].equal(drawn[1])
    # A map that adds the same numbers in every step converges.
    assert not solution.converged.any()


def test_captured_solves_of_several_threads_and_changing_data():
    def of_size(size):
        generator = torch.Generator("cuda").manual_seed(size)
        for _ in range(5):
            x = torch.randn(size, 16, device="cuda", dtype=torch.float64, generator=generator)
            compiled, eager = compiled_and_not(lambda z, x: (0.5 * z + x).sin(), 0 * x, x, rtol=1e-9)
            torch.testing.assert_close(compiled.value, eager.value)
            assert compiled.num_steps.equal(eager.num_steps)
        return size

    of_size(3)  # compiled by one
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(of_size, range(2, 10))) == list(range(2, 10))
    assert not _compiled._not_replayed


def test_a_compiled_layer_has_the_gradients_of_one_that_is_not():
    layer = FixedPointLayer(Map().double().eval(), solver="anderson", rtol=1e-10).cuda().eval()
    twin = copy.deepcopy(layer)
    twin.compiled = True
    x = torch.randn(16, 32, **cuda, requires_grad=True)
    results = [
        (z := call(x), *torch.autograd.grad(z.square().sum(), (x, *call.parameters()))) for call in (layer, twin)
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_an_exported_solve_runs_on_the_device(solver):
    layer = FixedPointLayer(Map(), solver=solver, rtol=1e-5, on_failure="ignore").cuda().eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(layer, (torch.randn(4, 32, device="cuda"),), dynamic_shapes=((batch,),)).module()
    with torch.no_grad():
        for size in (1, 7):
            x = torch.randn(size, 32, device="cuda")
            torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-4)


def kepler(anomaly, eccentricity, mean):
    return anomaly - eccentricity * torch.sin(anomaly) - mean


@pytest.mark.parametrize("options", [{}, {"solver": "newton"}, {"solver": "broyden"}, {"compact": True}], ids=str)
def test_roots_and_their_gradients_are_those_of_the_cpu(options):
    eccentricity, mean = 0.9 * torch.rand(100, dtype=torch.float64), 6 * torch.rand(100, dtype=torch.float64)
    found = {}
    for device in ("cpu", "cuda"):
        e, m = (t.to(device).requires_grad_() for t in (eccentricity, mean))
        value = root(kepler, m.detach(), e, m, rtol=1e-12, **options)
        found[device] = value, *torch.autograd.grad(value.sum(), (e, m))
    for here, there in zip(found["cpu"], found["cuda"], strict=True):
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), here, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("size", [3, 8, 80])
def test_roots_of_systems(size):
    weight, x = torch.randn(size, size, **cuda) / (3 * size**0.5), torch.randn(20, size, **cuda)
    value = root(lambda z, x: z + torch.sinh(0.3 * z @ weight) - x, torch.zeros_like(x), x, rtol=1e-12)
    torch.testing.assert_close(value + torch.sinh(0.3 * value @ weight), x)


def test_an_answer_that_another_solver_found():
    @differentiable(optimality=lambda z, x: 2 * z + torch.tanh(z) - x)
    def answer(x):
        z = torch.zeros_like(x)
        for _ in range(100):
            z = (x - torch.tanh(z)) / 2
        return z

    x = torch.randn(5, 3, **cuda, requires_grad=True)
    assert torch.autograd.gradcheck(answer, x)
    assert torch.autograd.gradgradcheck(answer, x)


def test_derivatives_of_every_kind():
    weight = torch.randn(4, 4, **cuda)
    weight = 0.5 * weight / torch.linalg.matrix_norm(weight, 2)

    def answer(x):
        return fixed_point(lambda z, x: torch.tanh(z @ weight + x), torch.zeros_like(x), x, rtol=1e-13)

    x = torch.randn(3, 4, **cuda, requires_grad=True)
    assert torch.autograd.gradcheck(answer, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(answer, x)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: answer(x.unsqueeze(0)).squeeze(0)))(x.detach())
    full = torch.autograd.functional.jacobian(answer, x.detach())
    for sample in range(3):
        torch.testing.assert_close(jacobian[sample], full[sample, :, sample], rtol=1e-8, atol=1e-10)


def test_the_doctor_and_the_audit_find_what_they_find_on_the_cpu():
    model = nn.Sequential(nn.Linear(6, 32), FixedPointLayer(Map(), solver="picard", rtol=1e-4)).double().eval()
    x = torch.randn(8, 6, dtype=torch.float64)
    here, there = diagnose(model, x), diagnose(copy.deepcopy(model).cuda(), x.cuda())
    assert there.causes == here.causes
    assert torch.allclose(there.layers["1"].rate.cpu(), here.layers["1"].rate, rtol=1e-2)
    audits = [
        audit_gradients(copy.deepcopy(model).to(device), x.to(device), loss=lambda y: y.square().sum()).to_dict()
        for device in ("cpu", "cuda")
    ]
    assert audits[0].keys() == audits[1].keys()


def test_monitoring_does_not_wait_for_the_device():
    layer = FixedPointLayer(Map(), solver="anderson", rtol=None, atol=None, max_steps=6, backward="unrolled").cuda()
    x = torch.randn(16, 32, device="cuda")
    with monitor_solves(layer) as solves:
        layer(x)
        with no_waiting():
            for _ in range(3):
                layer(x).sum().backward()
                solves.step()


@pytest.mark.parametrize("name", ["deq_transformer", "mdeq", "monotone_operator_network"])
def test_models_of_the_zoo_have_the_gradients_of_the_cpu(name):
    zoo = load(name)
    if name == "deq_transformer":
        model, x = zoo.DEQTransformer(100, context=24, width=32, heads=2), torch.randint(100, (3, 24))
    elif name == "mdeq":
        model, x = zoo.MDEQ(channels=8), torch.randn(6, 1, 8, 8)
    else:
        model, x = zoo.MonotoneNetwork(width=32), torch.randn(6, 64)
    model = model.double().eval()
    x = x.double() if x.is_floating_point() else x
    model.equilibrium.rtol, model.equilibrium.max_steps = 1e-11, 2000
    gradients = []
    for device in ("cpu", "cuda"):
        twin = copy.deepcopy(model).to(device)
        twin(x.to(device)).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in twin.parameters() if p.grad is not None]))
    assert (gradients[1] - gradients[0]).norm() < 1e-6 * gradients[0].norm()

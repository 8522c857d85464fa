"""What must hold on a CUDA device: the same answers, no needless waiting, mixed precision, compilation, graphs."""

import contextlib
import copy
import types
import warnings

import pytest
import torch
from small_models import relative_error, small, trained_somewhat
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F

from imixer.training.step import TrainingStep, make_optimizer
from implicit import FixedPointLayer, Implicit, spectral_norm
from implicit.diagnostics import OnItsWay
from solvers import Anderson, Broyden, NewtonKrylov, Picard, solve
from solvers.linear import GMRES, NeumannSeries
from solvers.testing import BANK

pytestmark = pytest.mark.gpu

SOLVERS = [Picard(), Anderson(), Anderson(least_squares="qr"), Broyden(), Broyden(memory=4)]
FIXED = {"rtol": None, "atol": None, "max_steps": 6}


class Map(nn.Module):
    def __init__(self, size=32):
        super().__init__()
        self.linear = spectral_norm(nn.Linear(size, size), coeff=0.8)

    def forward(self, z, x):
        return torch.tanh(self.linear(z)) + x


@contextlib.contextmanager
def no_waiting():
    """Inside, a wait for the device is an error: a copy to the host, or one to the device from pageable memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("solver", [*SOLVERS[:4], NewtonKrylov()], ids=str)
@pytest.mark.parametrize("problem", ["linear 0.9", "tanh", "H-equation"])
def test_same_answers_as_on_the_cpu(solver, problem):
    bank = BANK[problem](torch.float64)
    options = {"rtol": 1e-9, "atol": 0, "max_steps": 500, "on_failure": "raise"}
    here = solve(bank.f, bank.z0, solver, **options)
    there = solve(_moved(bank.f), bank.z0.cuda(), solver, **options)
    assert there.value.is_cuda
    assert torch.allclose(there.value.cpu(), here.value, rtol=1e-6)
    assert (there.num_steps.cpu() - here.num_steps).abs().max() <= 2


def _moved(f):
    """The same map on CUDA tensors: what it closes over is moved."""
    cells = [cell.cell_contents for cell in f.__closure__ or ()]
    moved = [c.cuda() if isinstance(c, torch.Tensor) else c for c in cells]
    closure = tuple(types.CellType(c) for c in moved)
    return types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, closure)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_fixed_steps_do_not_wait_for_the_device(solver):
    layer = FixedPointLayer(Map().cuda(), solver=solver, backward="unrolled", **FIXED)
    x = torch.randn(16, 32, device="cuda")
    with no_waiting():
        layer(x).sum().backward()


@pytest.mark.parametrize("backward", ["unrolled", "neumann", "phantom", "jfb"])
def test_an_imixer_step_does_not_wait_for_the_device(backward):
    model = small(backward=backward).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, y = torch.randn(4, 3, 16, 16, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
    for dtype in (torch.bfloat16, torch.float16):
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        with no_waiting():
            with torch.autocast("cuda", dtype=dtype):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


def test_waiting_is_an_error():
    x = torch.ones(3, device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_implicit_gradients_are_those_of_the_cpu(solver):
    layer = FixedPointLayer(
        Map().double().eval(),
        solver=solver,
        backward=Implicit(linear_solver=GMRES(rtol=1e-12)),
        rtol=1e-12,
        max_steps=300,
    )
    twin = copy.deepcopy(layer).cuda()
    x = torch.randn(16, 32, dtype=torch.float64)
    layer(x).square().sum().backward()
    twin(x.cuda()).square().sum().backward()
    for here, there in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(there.grad.cpu(), here.grad, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"backward": "implicit", "n_iter": 20, "rtol": 1e-2}], ids=["paper", "implicit"]
)
def test_mixed_precision(dtype, options):
    """Gradients under autocast, with loss scaling, are near those of float32."""
    model = trained_somewhat(small(**options)).cuda().eval()
    x, y = torch.randn(16, 3, 16, 16, device="cuda"), torch.arange(16, device="cuda") % 5
    gradients = {}
    for enabled in (False, True):
        model.zero_grad()
        scaler = torch.amp.GradScaler("cuda", enabled=enabled and dtype == torch.float16, init_scale=1024.0)
        with torch.autocast("cuda", dtype=dtype, enabled=enabled):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scale = scaler.get_scale() if scaler.is_enabled() else 1.0
        gradients[enabled] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]) / scale
    assert relative_error(gradients[True], gradients[False]) < 0.05


def fixed_layer(backward):
    return FixedPointLayer(Map().eval(), solver="anderson", backward=backward, **FIXED).eval()


SERIES = Implicit(linear_solver=NeumannSeries(terms=8))
in_one_graph = pytest.mark.parametrize("backward", ["unrolled", SERIES], ids=["unrolled", "implicit"])


def test_a_truncated_series_does_not_wait_for_the_device():
    layer = fixed_layer(SERIES).cuda()
    x = torch.randn(16, 32, device="cuda")
    with no_waiting():
        layer(x).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backward", ["unrolled", "implicit", SERIES], ids=str)
def test_layers_train_under_autocast(backward, dtype):
    """The state stays float32, the losses stay near those of float32, and the scaler skips no step."""
    losses, device = {}, "cuda"
    for enabled in (False, True):
        torch.manual_seed(0)
        layer = FixedPointLayer(Map(), backward=backward, rtol=1e-2).to(device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device, enabled=enabled and dtype == torch.float16, init_scale=1024.0)
        losses[enabled] = []
        for _ in range(5):
            x = torch.randn(16, 32, device=device)
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                z = layer(x)
                loss = (z - 1).square().mean()
            assert z.dtype == torch.float32
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[enabled].append(loss.item())
        assert scaler.get_scale() == (1024.0 if scaler.is_enabled() else 1.0)
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)


# PyTorch's own, while it compiles; TF32 stays off, for the results are compared.
compiling = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:The .grad attribute",
    "ignore:TensorFloat32 tensor cores",
    "ignore:The CUDA Graph is empty",  # the first of PyTorch's own graphs
)


@compiling
@in_one_graph
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiles_with_inductor(mode, backward):
    layer = fixed_layer(backward).cuda()
    fast = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(3):  # "reduce-overhead" captures a CUDA graph in the second call
        x = torch.randn(16, 32, device="cuda", requires_grad=True)
        results = [
            (z := call(x), *torch.autograd.grad(z.square().sum(), (x, *layer.parameters()))) for call in (layer, fast)
        ]
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


@compiling
def test_an_imixer_compiles_with_inductor():
    model = trained_somewhat(small()).cuda().eval()
    x = torch.randn(2, 3, 16, 16, device="cuda")
    assert torch.allclose(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-3)


@in_one_graph
def test_fixed_steps_can_be_captured_in_a_graph(backward):
    """Forward alone, and forward and backward in one graph; replays follow the input."""
    layer = fixed_layer(backward).cuda()
    x = torch.randn(16, 32, device="cuda", requires_grad=True)

    def run():
        z = layer(x)
        gradients = torch.autograd.grad(z.square().sum(), (x, *layer.parameters()))
        return z.detach(), *gradients  # what a graph of autograd holds belongs to the stream that it was recorded on

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
            with torch.no_grad():
                layer(x)
    torch.cuda.current_stream().wait_stream(side)
    forward, whole = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(forward):
        z = layer(x)
    with torch.cuda.graph(whole):
        results = run()
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        forward.replay()
        whole.replay()
        expected = run()
        assert torch.allclose(z, expected[0], atol=1e-5)
        for a, b in zip(results, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def training_step(*, cuda_graph=False, scaler=None, **options):
    torch.manual_seed(0)
    model = small(**options).cuda().train()
    optimizer = make_optimizer(model, opt="adamw", lr=1e-2, weight_decay=0.1, capturable=cuda_graph)
    return TrainingStep(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        autocast=lambda: torch.autocast("cuda", dtype=torch.float16 if scaler else torch.bfloat16),
        scaler=torch.amp.GradScaler("cuda", init_scale=1024.0) if scaler else None,
        clip_grad=1.0,
        ema=ModelEmaV3(model, decay=0.5),
        cuda_graph=cuda_graph,
    )


def training_batch(size=8):
    return torch.randn(size, 3, 16, 16, device="cuda"), torch.arange(size, device="cuda") % 5


@pytest.mark.parametrize("scaler", [False, True], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"norm": "batch"}], ids=str)
def test_an_update_does_not_wait_for_the_device(options, scaler):
    step = training_step(scaler=scaler, **options)
    step(*training_batch())  # makes the optimizer's state
    batches = [training_batch() for _ in range(3)]
    late = []
    with no_waiting():
        for batch in batches:
            step.add_gradient(*batch, share=0.5)
            step.add_gradient(*batch, share=0.5)
            late.append(OnItsWay(step.update(2, (1.0, 0.0))))
    assert [numbers.arrived()[2:] for numbers in late] == [[1, 1, 0]] * 3


@pytest.mark.parametrize("scaler", [False, True], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"norm": "batch"}], ids=str)
def test_graphs_take_the_steps_that_eager_code_takes(options, scaler):
    """Through a change of the rate, batches that are not finite, two batches to an update and one of another size."""
    steps = [training_step(cuda_graph=graph, scaler=scaler, **options) for graph in (False, True)]
    torch.manual_seed(1)
    for number in range(1, 11):
        batches = [training_batch(4 if number == 9 else 8) for _ in range(2)]
        if number in (2, 6):
            batches[1][0].fill_(torch.inf)
        found = []
        for step in steps:
            for group in step.optimizer.param_groups:
                group["lr"] = 1e-2 / number
            for batch in batches:
                step.add_gradient(*batch, share=0.5)
            found.append(step.update(number))
        assert found[0][2] == found[1][2] == (number not in (2, 6))
        assert number in (2, 6) or torch.allclose(found[1], found[0], rtol=1e-2)
    for a, b in zip(*(step._averages for step in steps), strict=True):
        assert a.isfinite().all()
        assert torch.allclose(a.float(), b.float(), rtol=0.1, atol=2e-2)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_training_on_the_gpu(tmp_path, cuda_graph):
    from accelerate.state import AcceleratorState

    from imixer.training import PRESETS, TrainingConfig, load_data, train

    chosen = {"device": "cuda", "amp": True, "epochs": 2, "batch_size": 128, "output": str(tmp_path / "run")}
    chosen["cuda_graph"] = cuda_graph
    config = TrainingConfig(**{**PRESETS["digits"], **chosen})
    AcceleratorState._reset_state(True)
    try:
        result = train(config, load_data(config), progress=False)
    finally:
        AcceleratorState._reset_state(True)
    assert result.metrics[-1].test_top1 > 30
    assert next(result.model.parameters()).is_cuda

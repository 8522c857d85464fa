"""When power iterations advance: once a training step, alone or together, also under gradient checkpointing."""

import contextlib
import copy

import pytest
import torch
from small_models import small, trained_somewhat
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from timm.models import MlpMixer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import implicit
from implicit import power_iterations_advanced, spectral_norm

IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
FORWARDS = {
    "forward": lambda model: model(IMAGES),
    "forward_features": lambda model: model.forward_features(IMAGES),
    "forward_intermediates": lambda model: torch.stack(model.forward_intermediates(IMAGES)[1]),
}


@pytest.fixture
def batched(monkeypatch):
    """Advance as on a GPU."""
    monkeypatch.setattr(implicit.spectral.power_iteration, "_ONE_BY_ONE", set())


@pytest.fixture(params=[False, True], ids=["", "reentrant"])
def reentrant(request):
    """Both ways of checkpointing."""
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(request.param)
    yield request.param
    set_reentrant_ckpt(before)


def moved(model):
    """The model with other weights than those that its singular vectors belong to: each iteration changes them."""
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def after_step(model, forward):
    """Gradients and buffers of a copy of the model after a forward and a backward pass."""
    model = copy.deepcopy(model)
    forward(model).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return gradients | dict(model.named_buffers())


def assert_same(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm().clamp_min(1), name


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS.keys())
def test_checkpointing_changes_nothing(forward, reentrant):
    """A block that is computed again in the backward pass must not advance its power iterations again."""
    model = moved(trained_somewhat(small(n_power=1)))
    expected = after_step(model, forward)
    model.set_grad_checkpointing()
    assert_same(after_step(model, forward), expected)


def test_checkpointing_changes_nothing_batched(batched, reentrant):
    test_checkpointing_changes_nothing(FORWARDS["forward"], reentrant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_a_layer_changes_nothing(dtype, reentrant):
    layer = moved(spectral_norm(nn.Linear(6, 6), coeff=0.1, n_power_iterations=1)).to(dtype)
    x = torch.randn(3, 6, dtype=dtype, requires_grad=True)
    expected = after_step(layer, lambda layer: layer(x))
    assert_same(after_step(layer, lambda layer: checkpoint(layer, x, use_reentrant=reentrant)), expected)


@pytest.mark.parametrize(("way", "tolerance"), [("one by one", 0.0), ("batched", 1e-4)])
def test_advanced_together_as_alone(way, tolerance, request):
    model = moved(trained_somewhat(small(n_power=2)))
    expected = after_step(model, lambda model: model.forward_head(MlpMixer.forward_features(model, IMAGES)))
    if way == "batched":
        request.getfixturevalue("batched")
    assert_same(after_step(model, FORWARDS["forward"]), expected, tolerance)


def test_each_forward_advances_once(batched):
    model = small(n_power=1, features_only=True, out_indices=(0, 1))
    moved(model)
    twin = copy.deepcopy(model)
    model(IMAGES)
    MlpMixer.forward_intermediates(twin.model, IMAGES)
    assert_same(dict(model.named_buffers()), dict(twin.named_buffers()), 1e-5)
    before = copy.deepcopy(model.state_dict())
    model.eval()(IMAGES)
    assert_same(model.state_dict(), before)


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_batched_kernels_do_not_grow_with_the_layers(batched):
    counts = []
    for num_layers in (2, 12):
        net = nn.Sequential(*[spectral_norm(nn.Linear(8, 8)) for _ in range(num_layers)])
        with Kernels() as kernels, power_iterations_advanced(net):
            counts.append(kernels.count)
    assert counts[0] == counts[1]


def test_what_is_alike_is_batched(batched):
    """Layers of other shapes, options and dtypes, convolutions, and one below another parametrization."""
    net = nn.Module()
    net.layers = nn.ModuleList(
        [spectral_norm(nn.Linear(6, 4), n_power_iterations=n) for n in (1, 1, 2)]
        + [spectral_norm(nn.Linear(4, 6), n_power_iterations=1, method=method) for method in ("power", "gram")]
        + [spectral_norm(nn.Linear(4, 6).to(dtype), n_power_iterations=1) for dtype in (torch.float64, torch.bfloat16)]
        + [spectral_norm(nn.Conv1d(2, 2, 3), n_power_iterations=1, input_size=(9,))]
        + [spectral_norm(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), n_power_iterations=1)]
    )
    moved(net)
    alone = copy.deepcopy(net)
    expected = [layer.weight.float() for layer in alone.layers]
    with power_iterations_advanced(net):
        found = [layer.weight.float() for layer in net.layers]
        again = [layer.weight.float() for layer in net.layers[:-1]]
    for i, value in enumerate(expected):
        assert torch.allclose(found[i], value, atol=1e-5), i
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=False))
    assert_same(dict(list(net.named_buffers())[:-2]), dict(list(alone.named_buffers())[:-2]), 1e-5)


def test_an_error_inside_leaves_nothing_behind():
    layer = moved(spectral_norm(nn.Linear(5, 5), n_power_iterations=1))
    with pytest.raises(KeyError), power_iterations_advanced(layer):
        raise KeyError
    before = layer.parametrizations.weight[0].u.clone()
    layer.weight.sum().backward()
    assert not torch.equal(layer.parametrizations.weight[0].u, before)


def test_two_forwards_before_one_backward(batched):
    net = nn.Sequential(*[spectral_norm(nn.Linear(6, 6), coeff=0.1) for _ in range(2)])
    losses = []
    for _ in range(2):
        with power_iterations_advanced(net):
            losses.append(net(torch.randn(3, 6)).square().sum())
    sum(losses).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_to_one_graph_in_training(checkpointing, batched):
    model = moved(trained_somewhat(small(num_blocks=1, h_ratio=1.0, n_power=1)))
    model.set_grad_checkpointing(checkpointing)
    expected = after_step(model, FORWARDS["forward"])
    torch.compiler.reset()

    def compiled(model):
        return torch.compile(model, backend="aot_eager", fullgraph=True)(IMAGES)

    # PyTorch 2.11 asks for leave: the cache of parametrized weights is a side effect.
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        assert_same(after_step(model, compiled), expected, 1e-5)


@pytest.mark.gpu
def test_batched_on_a_gpu_as_one_by_one_on_a_cpu():
    model = moved(trained_somewhat(small(n_power=2)))
    expected = after_step(model, FORWARDS["forward"])
    found = after_step(model.cuda(), lambda model: model(IMAGES.cuda()))
    assert_same({name: value.cpu() for name, value in found.items()}, expected, 1e-3)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-10, 1e-7, 1e30])
@pytest.mark.parametrize("together", [False, True])
def test_weights_that_start_at_zero_or_at_any_size_are_normalized_later(batched, size, together):
    """The singular vectors stay unit vectors, and follow the weight once it has a size."""
    net = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(2)])
    for layer in net:
        nn.init.eye_(layer.weight).data.mul_(size)
        spectral_norm(layer, coeff=0.9)
    for later in (False, True):
        for layer in net if later else ():
            layer.parametrizations.weight.original.data.copy_(3 * torch.eye(4) + 0.1 * torch.ones(4, 4))
        for _ in range(30):
            with power_iterations_advanced(net) if together else contextlib.nullcontext():
                net(torch.ones(1, 4))
        for layer in net:
            norm = layer.parametrizations.weight[0]
            assert abs(norm.u.norm() - 1) < 1e-5
            assert abs(norm.v.norm() - 1) < 1e-5
    net.eval()
    for layer in net:
        assert abs(torch.linalg.matrix_norm(layer.weight, 2) - 0.9) < 1e-3

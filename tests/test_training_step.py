"""The training step: updates that are left out leave no trace, gradients are right, and blocks compile once."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from small_models import SMALL, small
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import difference

from imixer.training.step import TrainingStep, compile_blocks, make_optimizer
from implicit.diagnostics import OnItsWay

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default}


class Waits(TorchDispatchMode):
    """Counts where the host asks for a number, for which it would wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in WAITS
        return func(*args, **(kwargs or {}))


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 16, 16), torch.arange(size) % SMALL["num_classes"]


def make_step(model: nn.Module, opt: str = "adamw", *, ema: bool = False, **options: Any) -> TrainingStep:
    optimizer = make_optimizer(model, opt=opt, lr=1e-2, weight_decay=0.1)
    average = ModelEmaV3(model, decay=0.5) if ema else None
    return TrainingStep(model.train(), nn.CrossEntropyLoss(), optimizer, ema=average, **options)


def state_of(step: TrainingStep) -> dict[str, Any]:
    average = step._ema.module.state_dict() if step._ema is not None else None
    return copy.deepcopy({"model": step.model.state_dict(), "opt": step.optimizer.state_dict(), "average": average})


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e38])
@pytest.mark.parametrize("options", [{"norm": "batch"}, {}], ids=["batch norm", "spectral norm"])
@pytest.mark.parametrize("opt", ["adamw", "sgd", "lion", "adagrad"])
def test_an_update_that_is_left_out_leaves_no_trace(opt: str, options: dict[str, Any], value: float) -> None:
    step = make_step(small(**options), opt, ema=True, clip_grad=1.0)
    bad = (torch.full((8, 3, 16, 16), value), batch()[1])
    for _ in range(2):  # an optimizer without its state, and with it
        before = state_of(step)
        loss, norm, finite = step(*bad).tolist()
        assert finite == 0
        assert not (math.isfinite(loss) and math.isfinite(norm))
        assert difference(state_of(step), before) == []
        assert all(parameter.grad is None for parameter in step.model.parameters())
        assert step(*batch())[2] == 1
        assert difference(state_of(step)["model"], before["model"]) != []
        assert all(tensor.isfinite().all() for tensor in step.model.state_dict().values())


def test_one_bad_batch_of_several_leaves_the_update_out() -> None:
    step = make_step(small(norm="batch"), ema=True)
    step(*batch())
    before = state_of(step)
    for images in (batch()[0], torch.full((8, 3, 16, 16), math.nan), batch()[0]):
        step.add_gradient(images, batch()[1], share=1 / 3)
    assert step.update(2)[2] == 0
    assert difference(state_of(step), before) == []


@pytest.mark.parametrize("opt", ["adamw", "lion"])
def test_an_infinite_loss_with_a_finite_gradient_is_left_out(opt: str) -> None:
    model = small()
    optimizer = make_optimizer(model, opt=opt, lr=1e-2)
    offset = torch.zeros(())
    step = TrainingStep(model.train(), lambda *given: nn.functional.cross_entropy(*given) + offset, optimizer)
    step(*batch())
    before = state_of(step)
    offset.fill_(math.inf)
    loss, norm, finite = step(*batch()).tolist()
    assert (loss, math.isfinite(norm), finite) == (math.inf, True, 0)
    assert difference(state_of(step), before) == []


def test_what_a_step_forgets_is_as_if_it_had_not_been() -> None:
    twins = [make_step(small(norm="batch")), make_step(small(norm="batch"))]
    twins[1].model.load_state_dict(twins[0].model.state_dict())
    batches = [batch() for _ in range(3)]
    for step in twins:
        step(*batches[0])
    twins[0].add_gradient(*batches[1])
    twins[0].forget()
    for step in twins:
        step(*batches[2])
    assert difference(state_of(twins[0]), state_of(twins[1])) == []


@pytest.mark.parametrize(("opt", "waits"), [("adamw", False), ("adam", False), ("sgd", False), ("lion", True)])
def test_only_optimizers_that_cannot_skip_wait_for_the_device(opt: str, waits: bool) -> None:
    step = make_step(small(norm="batch"), opt, ema=True, clip_grad=0.1)
    step(*batch())
    with Waits() as mode:
        step.add_gradient(*batch(), share=0.5)
        step.add_gradient(*batch(), share=0.5)
        assert mode.count == 0
        numbers = OnItsWay(step.update(2, (1.0, 0.0)))
    assert (mode.count > 0) == waits
    assert numbers.arrived()[2:] == [1, 1, 0]


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    images, targets = batch(12)
    model = small().eval()
    steps = [make_step(copy.deepcopy(model), "sgd") for _ in range(2)]
    for step in steps:
        step.model.eval()  # the power iteration advances in each forward pass
    whole = steps[0](images, targets)
    for part in range(3):
        steps[1].add_gradient(images[part::3], targets[part::3], share=1 / 3)
    parts = steps[1].update(1)
    assert torch.allclose(parts, whole, rtol=1e-5)
    for a, b in zip(steps[0].model.parameters(), steps[1].model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_and_the_norm_is_that_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    images, targets = batch()
    loss = nn.functional.cross_entropy(model(images), targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found = TrainingStep(model, nn.CrossEntropyLoss(), optimizer, clip_grad=norm / 4)(images, targets)
    assert found[0].item() == pytest.approx(loss.item())
    assert found[1].item() == pytest.approx(norm, rel=1e-5)
    for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        assert torch.allclose(old - parameter, gradient / 4, rtol=1e-4, atol=1e-7)


def test_the_average_follows_the_weights() -> None:
    step = make_step(small(), ema=True)
    ema = step._ema
    assert ema is not None
    name = "blocks.0.mlp_channels.fc1.weight"
    expected = None
    for number in range(1, 5):
        step(*batch())
        weight = step.model.state_dict()[name].double()
        expected = weight if number <= 1 or expected is None else 0.5 * expected + 0.5 * weight
        assert torch.allclose(ema.module.state_dict()[name].double(), expected, atol=1e-6)


def test_biases_have_no_weight_decay_and_matrices_have() -> None:
    model = small()
    optimizer = make_optimizer(model, opt="adamw", lr=1e-2, weight_decay=0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    assert {name for name, value in decay.items() if value == 0} == {
        name for name, p in model.named_parameters() if p.ndim <= 1
    }
    assert set(decay.values()) == {0, 0.1}


@pytest.mark.parametrize(
    ("opt", "message"), [("lion", "fused adam or adamw, not lion"), ("sgd", "fused adam or adamw, not sgd")]
)
def test_optimizers_that_cannot_be_captured_are_refused(opt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimizer(small(), opt=opt, lr=1e-2, weight_decay=0, capturable=True)


def test_graphs_need_cuda() -> None:
    with pytest.raises(ValueError, match="--cuda-graph needs a CUDA device and one process, not device cpu"):
        make_step(small(), cuda_graph=True)


# PyTorch's own, while it compiles.
compiling = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


class Counting:
    """A backend that counts the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs += 1
        return graph


@pytest.mark.long
@compiling
@pytest.mark.parametrize("options", [{}, {"norm": "batch"}, {"tied": True}, {"drop_path_rate": 0.1}], ids=str)
def test_blocks_compile_once(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    backend = Counting()
    model = small(num_blocks=6, **options)
    compile_blocks(model, backend)
    step = make_step(model)
    for _ in range(3):
        step(*batch())
    assert backend.graphs == 1
    with torch.no_grad():
        model.eval()(batch()[0])
    assert backend.graphs == 2  # one more, without gradients and in eval mode


def test_a_model_without_blocks_compiles_as_a_whole() -> None:
    torch.compiler.reset()
    backend = Counting()
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    compile_blocks(model, backend)
    make_step(model)(*batch())
    assert backend.graphs == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [{}, {"norm": "batch"}, {"backward": "implicit", "n_iter": 30, "rtol": 1e-5}], ids=str
)
@compiling
def test_compiled_blocks_train_as_the_others_do(options: dict[str, Any]) -> None:
    """Singular vectors too: they advance once per forward pass."""
    torch.compiler.reset()
    steps = [make_step(small(**options), "sgd") for _ in range(2)]
    steps[1].model.load_state_dict(steps[0].model.state_dict())
    compile_blocks(steps[1].model, "eager")
    for _ in range(3):
        images, targets = batch()
        losses = [step(images, targets)[0] for step in steps]
        assert torch.allclose(losses[0], losses[1], rtol=1e-5)
    for (name, a), b in zip(steps[0].model.state_dict().items(), steps[1].model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name

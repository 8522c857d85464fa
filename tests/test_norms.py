"""The norms of Table 3: what each does to the weights, to gradients, to the map and to its convergence."""

import copy
import math
import re

import pytest
import torch
from small_models import relative_error, small, trained_somewhat
from torch import nn
from torch.nn import functional as F

from imixer import IMLP, measure_convergence
from implicit import Implicit, check_map, checked_maps
from solvers.linear import GMRES

NORMS = ["spectral", "none", "batch", "batch_per_step", "weight"]
BATCH = ["batch", "batch_per_step"]


def parts(imlp):
    """The two linear layers of the map and the batch norms after them."""
    return imlp.fc_sn1, imlp.bn1, imlp.fc_sn2, imlp.bn2


def tamed(imlp, factor):
    """Weights so small that the iteration converges without a bound on them."""
    with torch.no_grad():
        for name, parameter in imlp.named_parameters():
            if name in ("bn2.weight", "bn4.weight"):
                parameter.fill_(factor)
            elif (imlp.norm == "none" and "fc_sn" in name) or name.endswith("original0"):
                parameter.mul_(factor)


SOLVED = {"rtol": 1e-1, "n_iter": 40, "solver": "broyden"}
BACKWARDS = {
    "unrolled": {},
    "checkpointed": {"backward": "checkpointed"},
    **{mode: {"backward": mode, **SOLVED} for mode in ("implicit", "phantom", "neumann", "jfb", "shine")},
    "implicit, nested": {"backward": "implicit", "hidden_layers": 3, **SOLVED},
    "implicit, joint": {"backward": "implicit", "hidden_layers": 3, "hidden_solve": "joint", **SOLVED},
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", BACKWARDS.values(), ids=BACKWARDS.keys())
def test_every_parameter_gets_a_gradient(norm, options):
    if norm == "batch_per_step" and options:
        pytest.skip("refused, see below")
    model = trained_somewhat(small(norm=norm, coeff=0.5, num_blocks=1, **options))
    tamed(model.blocks[0].mlp_tokens, 0.02)
    F.cross_entropy(model(torch.randn(2, 3, 16, 16)), torch.tensor([0, 1])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("norm", NORMS)
def test_state_dicts_and_copies(norm):
    model = trained_somewhat(small(norm=norm))
    x = torch.randn(2, 3, 16, 16)
    model(x)  # power iteration and running statistics advance
    model.eval()
    fresh = small(norm=norm).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("norm", NORMS)
def test_initial_weights_are_xavier_uniform(norm):
    torch.manual_seed(0)
    layers = 2 if norm == "batch_per_step" else 3
    imlp = small(norm=norm, embed_dim=96, hidden_layers=layers).blocks[0].mlp_tokens
    assert len(imlp.normalized_layers) == 2 * (layers - 1)
    for layer in imlp.normalized_layers:
        weight = layer.parametrizations.weight.original if norm == "spectral" else layer.weight
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.99 * bound < weight.abs().max() <= bound * (1 + 1e-6)
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        if norm == "weight":
            assert torch.allclose(layer.parametrizations.weight.original0, weight.norm(dim=1, keepdim=True))
        assert (layer.bias is None) == (norm in BATCH)  # which would remove it
        if layer.bias is not None:
            assert 0.5e-6 < layer.bias.std() < 2e-6


@pytest.mark.parametrize("norm", [*BATCH, "weight"])
def test_trains_and_compiles(norm):
    model = small(norm=norm, num_blocks=1)
    imlp = model.blocks[0].mlp_tokens.train()
    x = torch.randn(6, 16)
    expected = copy.deepcopy(imlp)(x)
    compiled = torch.compile(imlp, backend="aot_eager", fullgraph=True)(x)
    assert torch.allclose(compiled, expected, atol=1e-6)


class TestBatch:
    """Batch statistics are taken once, at the start, and are constants of the solve."""

    def test_one_step_is_plain_batch_normalization(self):
        imlp = IMLP(7, 6, norm="batch", n_iter=1)
        for norm in (imlp.bn1, imlp.bn2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        plain = copy.deepcopy(imlp)
        x = torch.randn(9, 7)
        for _ in range(3):
            y = plain.fc1(x)
            linear1, norm1, linear2, norm2 = parts(plain)
            z = y + norm2(linear2(plain.act(norm1(linear1(plain.act(y))))))
            expected = plain.fc2(plain.act(z))
            assert torch.allclose(imlp(x), expected, atol=1e-5)
        imlp(x).square().sum().backward()
        plain_z = y + norm2(linear2(plain.act(norm1(linear1(plain.act(y))))))
        plain.fc2(plain.act(plain_z)).square().sum().backward()
        for (name, ours), theirs in zip(imlp.named_parameters(), plain.parameters(), strict=True):
            assert relative_error(ours.grad, theirs.grad) < 1e-4, name
        for (name, ours), theirs in zip(imlp.named_buffers(), plain.buffers(), strict=True):
            assert torch.allclose(ours.float(), theirs.float(), rtol=1e-4), name

    def test_eval_mode_uses_the_running_statistics(self):
        imlp = IMLP(7, 6, norm="batch", n_iter=3)
        imlp(torch.randn(9, 7))
        imlp.eval()
        before = {name: buffer.clone() for name, buffer in imlp.named_buffers()}
        x = torch.randn(4, 7)
        linear1, norm1, linear2, norm2 = parts(imlp)
        y = z = imlp.fc1(x)
        for _ in range(3):
            z = y + norm2(linear2(imlp.act(norm1(linear1(imlp.act(z))))))
        assert torch.allclose(imlp(x), imlp.fc2(imlp.act(z)), atol=1e-5)
        assert torch.allclose(imlp(x)[:1], imlp(x[:1]), atol=1e-6)  # rows are independent
        assert all(torch.equal(buffer, before[name]) for name, buffer in imlp.named_buffers())

    @pytest.mark.parametrize("n_iter", [1, 5])
    def test_running_statistics_advance_once_a_forward_pass(self, n_iter):
        imlp = IMLP(7, 6, norm="batch", n_iter=n_iter)
        imlp(torch.randn(9, 7))
        assert [int(norm.num_batches_tracked) for norm in (imlp.bn1, imlp.bn2)] == [1, 1]

    @pytest.mark.parametrize("options", [{}, {"hidden_layers": 3}, {"hidden_layers": 4, "hidden_solve": "joint"}])
    def test_the_map_is_pure_in_training_mode(self, options):
        imlp = IMLP(7, 6, norm="batch", **options).train()
        with checked_maps(imlp):
            imlp(torch.randn(5, 7))

    def test_inside_the_map_it_would_be_refused(self):
        """What the folding is for."""
        block = nn.Sequential(nn.GELU(), nn.Linear(6, 6), nn.BatchNorm1d(6))
        with pytest.raises(ValueError, match=r"(?s)changes running_mean.*depends on the others in the batch"):
            check_map(lambda z, y: y + block(z), torch.randn(5, 6), torch.randn(5, 6))

    @pytest.mark.usefixtures("double")
    def test_gradients_flow_through_the_statistics(self):
        """Implicit agrees with unrolling, and unrolling with finite differences, in training mode."""
        x = torch.randn(5, 4, requires_grad=True)
        found = []
        for options in (
            {"n_iter": 80},
            {"n_iter": 80, "rtol": 1e-13, "backward": Implicit(linear_solver=GMRES(rtol=1e-13))},
        ):
            torch.manual_seed(0)
            imlp = IMLP(4, 3, norm="batch", **options)
            tamed(imlp, 0.02)
            found.append([*torch.autograd.grad(imlp(x).sin().sum(), [x, *imlp.parameters()])])
        for ours, theirs in zip(*found, strict=True):
            assert relative_error(ours, theirs) < 1e-9
        assert torch.autograd.gradcheck(IMLP(4, 3, norm="batch", n_iter=3), (x,))

    def test_frozen_statistics(self):
        """A norm in eval mode keeps its running statistics, as everywhere, whatever mode the iMLP is in."""
        imlp = IMLP(7, 6, norm="batch")
        imlp(torch.randn(9, 7))
        imlp.bn2.eval()
        before = imlp.bn2.running_mean.clone()
        imlp(torch.randn(9, 7))
        assert [int(norm.num_batches_tracked) for norm in (imlp.bn1, imlp.bn2)] == [2, 1]
        assert torch.equal(imlp.bn2.running_mean, before)
        imlp.bn1.eval()
        x = torch.randn(4, 7)
        assert torch.equal(imlp(x), imlp.eval()(x))

    def test_a_single_row_has_no_statistics(self):
        imlp = IMLP(7, 6, norm="batch")
        with pytest.raises(ValueError, match="two rows or more to take statistics of, got 1"):
            imlp(torch.randn(1, 7))
        imlp.eval()(torch.randn(1, 7))


@pytest.mark.parametrize(("norm", "updates"), [("batch", 1), ("batch_per_step", 3)])
def test_gradient_checkpointing_updates_running_statistics_again(norm, updates):
    """As in any model with batch normalization; the gradients are those without it."""
    plain = trained_somewhat(small(norm=norm, n_iter=3)).train()
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing()
    x = torch.randn(2, 3, 16, 16)
    for model, times in ((plain, 1), (again, 2)):
        model(x).square().sum().backward()
        assert model.blocks[1].mlp_tokens.bn2.num_batches_tracked == times * updates
    for ours, theirs in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


class Published:
    """The published forward pass in training mode with batch normalization in each step, written out.

    It keeps running statistics of its own, by the textbook formulas, and shares only the parameters of an iMLP.
    """

    def __init__(self, imlp):
        self.imlp = imlp
        self.running = [(torch.zeros(len(layer.weight)), torch.ones(len(layer.weight))) for layer in parts(imlp)[::2]]

    def normalized(self, number, x):
        norm = parts(self.imlp)[2 * number + 1]
        count = x.numel() // x.shape[-1]
        dims = tuple(range(x.dim() - 1))
        mean = x.sum(dims) / count
        variance = ((x - mean) ** 2).sum(dims) / count
        before = self.running[number]
        unbiased = variance * count / (count - 1)
        self.running[number] = (0.9 * before[0] + 0.1 * mean.detach(), 0.9 * before[1] + 0.1 * unbiased.detach())
        return (x - mean) / torch.sqrt(variance + 1e-5) * norm.weight + norm.bias

    def __call__(self, x, n_iter):
        linear1, _, linear2, _ = parts(self.imlp)
        x = F.linear(x, self.imlp.fc1.weight, self.imlp.fc1.bias)
        x_in = x
        for _ in range(n_iter):
            x = self.normalized(0, F.gelu(x) @ linear1.weight.t())
            x = self.normalized(1, F.gelu(x) @ linear2.weight.t())
            x = x + x_in
        return F.linear(F.gelu(x), self.imlp.fc2.weight, self.imlp.fc2.bias)


class TestBatchPerStep:
    """Each training step takes statistics of its own, and updates the running ones."""

    @pytest.mark.usefixtures("double")
    @pytest.mark.parametrize("n_iter", [1, 2, 5])
    def test_training_is_the_published_forward(self, n_iter):
        imlp = IMLP(7, 6, norm="batch_per_step", n_iter=n_iter)
        for norm in parts(imlp)[1::2]:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        published = Published(imlp)
        for _ in range(3):
            x = torch.randn(4, 3, 7, requires_grad=True)
            outputs = imlp(x), published(x, n_iter)
            inputs = [x, *imlp.parameters()]
            found, expected = (torch.autograd.grad(output.sin().sum(), inputs) for output in outputs)
            assert relative_error(*outputs) < 1e-12
            for ours, theirs in zip(found, expected, strict=True):
                assert relative_error(ours, theirs) < 1e-11
        for norm, (mean, variance) in zip(parts(imlp)[1::2], published.running, strict=True):
            assert relative_error(norm.running_mean, mean) < 1e-12
            assert relative_error(norm.running_var, variance) < 1e-12
            assert norm.num_batches_tracked == 3 * n_iter

    def test_one_step_is_the_same_as_with_constant_statistics(self):
        per_step, constant = (IMLP(7, 6, norm=norm, n_iter=1) for norm in ("batch_per_step", "batch"))
        constant.load_state_dict(per_step.state_dict())
        x = torch.randn(9, 7)
        assert torch.allclose(per_step(x), constant(x), atol=1e-5)
        for ours, theirs in zip(per_step.buffers(), constant.buffers(), strict=True):
            assert torch.allclose(ours.float(), theirs.float(), rtol=1e-4)

    def test_more_steps_are_not(self):
        per_step, constant = (IMLP(7, 6, norm=norm, n_iter=3) for norm in ("batch_per_step", "batch"))
        constant.load_state_dict(per_step.state_dict())
        x = torch.randn(9, 7)
        assert relative_error(per_step(x), constant(x)) > 1e-3

    def test_eval_mode_is_the_same_map_as_with_constant_statistics(self):
        """And solves to a tolerance there, with the weights of training."""
        per_step = IMLP(7, 6, norm="batch_per_step", n_iter=3)
        for _ in range(5):
            per_step(torch.randn(9, 7))
        constant = IMLP(7, 6, norm="batch", n_iter=3)
        constant.load_state_dict(per_step.state_dict())
        x = torch.randn(4, 7)
        before = {name: buffer.clone() for name, buffer in per_step.named_buffers()}
        assert torch.equal(per_step.eval()(x), constant.eval()(x))
        assert torch.allclose(per_step(x)[:1], per_step(x[:1]), atol=1e-6)  # rows are independent
        assert all(torch.equal(buffer, before[name]) for name, buffer in per_step.named_buffers())

    def test_frozen_statistics(self):
        imlp = IMLP(7, 6, norm="batch_per_step", n_iter=3)
        imlp(torch.randn(9, 7))
        imlp.bn2.eval()
        before = imlp.bn2.running_mean.clone()
        imlp(torch.randn(9, 7))
        assert [int(norm.num_batches_tracked) for norm in (imlp.bn1, imlp.bn2)] == [6, 3]
        assert torch.equal(imlp.bn2.running_mean, before)
        imlp.bn1.eval()
        x = torch.randn(4, 7)
        assert torch.equal(imlp(x), imlp.eval()(x))

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"rtol": 1e-3}, "rtol=0.001"),
            ({"backward": "implicit"}, "backward='implicit'"),
            ({"backward": "checkpointed"}, "backward='checkpointed'"),
            ({"backward": "jfb", "n_iter": 9}, "backward='jfb'"),
            ({"solver": "anderson"}, "solver='anderson'"),
            ({"hidden_layers": 3}, "hidden_layers=3"),
            ({"solver": "broyden", "rtol": 1e-2}, "solver='broyden', rtol=0.01"),
        ],
    )
    def test_what_cannot_be_right_is_refused(self, options, named):
        message = rf'another map.*rtol=None.*got {re.escape(named)}\. Choose these, or norm="batch"'
        with pytest.raises(ValueError, match=message):
            IMLP(7, 6, norm="batch_per_step", **options)
        if "hidden_layers" not in options:
            model = small(norm="batch_per_step")
            with pytest.raises(ValueError, match=message):
                model.set_solver(**options)
            assert model.blocks[0].mlp_tokens.options["rtol"] is None

    def test_tied_weights_are_refused(self):
        with pytest.raises(ValueError, match="tied=True needs another norm than 'batch_per_step'"):
            IMLP(7, 6, norm="batch_per_step", tied=True)

    def test_a_single_row_has_no_statistics(self):
        imlp = IMLP(7, 6, norm="batch_per_step")
        with pytest.raises(ValueError, match="more than 1 value"):
            imlp(torch.randn(1, 7))
        imlp.eval()(torch.randn(1, 7))


def test_what_the_norm_does_to_convergence():
    """Table 3 in small, before any training and with weights three times as large: residuals against n_iter."""
    residuals = {}
    for norm in NORMS:
        for growth in (1, 3):
            torch.manual_seed(0)
            model = small(norm=norm, num_blocks=1)
            images = torch.randn(4, 3, 16, 16)
            imlp = model.blocks[0].mlp_tokens
            with torch.no_grad():
                for layer in imlp.normalized_layers:
                    weight = layer.parametrizations.weight.original if norm == "spectral" else layer.weight
                    layer.weight = nn.Parameter(growth * weight) if norm in ("none", *BATCH) else growth * weight
                for _ in range(50):  # until the running statistics are those of the images
                    model(images)
            for n_iter in (1, 4, 20):
                row = measure_convergence(model.set_solver(n_iter=n_iter), images)[0]
                residuals[norm, growth, n_iter] = row.median_residual
    # Bounded weights: each step gains more than a digit, however large the weights become.
    assert residuals["spectral", 1, 4] < 1e-3
    assert residuals["spectral", 1, 20] < 1e-6
    assert residuals["spectral", 3, 20] == pytest.approx(residuals["spectral", 1, 20], abs=1e-6)
    # Unbounded ones: that is so by the grace of their initial size.
    for norm in ("none", "weight"):
        assert residuals[norm, 1, 4] > 10 * residuals["spectral", 1, 4]
        assert residuals[norm, 1, 20] < 1e-3
        assert residuals[norm, 3, 20] > 0.1
    # Normalized outputs: the same at every size of the weights, and no contraction at any.
    for growth in (1, 3):
        assert residuals["batch", growth, 1] > residuals["batch", growth, 20] > 0.05
        assert residuals["batch_per_step", growth, 1] > residuals["batch_per_step", growth, 20] > 1e-3

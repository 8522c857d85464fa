"""Maps that cannot be solved are found out, and the module to blame is named."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from implicit import (
    FixedPointLayer,
    InvertibleResidual,
    check_map,
    checked_maps,
    dropout_mask,
    fixed_point,
    spectral_norm,
)
from solvers.testing.problems import conv, h_equation, imlp, tanh


class Cell(nn.Module):
    """A map around the module under test, which sees (B, 6) numbers."""

    def __init__(self, inner):
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Tanh(), inner)

    def forward(self, z, x):
        return 0.1 * self.block(self.before(z)) + x


class AddedNoise(nn.Module):
    def forward(self, x):
        return x + 0.01 * torch.randn_like(x)


class Counter(nn.Module):
    """Carries a state that no buffer holds."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x / self.calls


class Memory(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(6))

    def forward(self, x):
        self.last = x.mean(0)
        return x


class Rolled(nn.Module):
    def forward(self, x):
        return x + 0.1 * x.roll(1, 0)


class LastIntoFirst(nn.Module):
    def forward(self, x):
        return torch.cat((x[:1] + 1e-3 * x[-1:], x[1:]))


class Attention(nn.Module):
    """Over the samples instead of the tokens."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


UNFIT = {
    "dropout": (lambda: nn.Dropout(0.1), [r"Cell.block.1 \(Dropout\) returns something else in each call"]),
    "rrelu": (nn.RReLU, [r"Cell.block.1 \(RReLU\) returns something else"]),
    "noise": (AddedNoise, [r"Cell.block.1 \(AddedNoise\) returns something else"]),
    "counter": (Counter, [r"Cell.block.1 \(Counter\) returns something else"]),
    "memory": (Memory, [r"A call changes last of Cell.block.1 \(Memory\)"]),
    "batchnorm": (
        lambda: nn.BatchNorm1d(6),
        [
            r"A call changes running_mean, running_var, num_batches_tracked of Cell.block.1 \(BatchNorm1d\)",
            r"What Cell.block.1 \(BatchNorm1d\) returns for one sample depends on the others in the batch. Use Group",
        ],
    ),
    "batchnorm without buffers": (
        lambda: nn.BatchNorm1d(6, track_running_stats=False),
        [r"What Cell.block.1 \(BatchNorm1d\) returns for one sample"],
    ),
    "rolled": (Rolled, [r"What Cell.block.1 \(Rolled\) returns for one sample"]),
    "one pair": (LastIntoFirst, [r"What Cell.block.1 \(LastIntoFirst\) returns for one sample"]),
    "attention": (Attention, [r"What Cell.block.1.inner \(MultiheadAttention\) returns for one sample"]),
    "legacy spectral norm": (
        lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
        [
            r"A call changes weight_u, weight_v of Cell.block.1 \(Linear\). .*torch.nn.utils.parametrizations",
            r"Cell.block.1 \(Linear\) returns something else in each call",
        ],
    ),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated")
@pytest.mark.parametrize("unfit", UNFIT.values(), ids=UNFIT.keys())
@pytest.mark.parametrize("batch", [2, 5])
def test_the_module_to_blame_is_named(unfit, batch):
    make, messages = unfit
    f = Cell(make())
    state = {name: value.clone() for name, value in f.state_dict().items()}
    random_state = torch.get_rng_state()
    with pytest.raises(ValueError, match="^f is not a map that can be solved") as error:
        check_map(f, torch.zeros(batch, 6), torch.randn(batch, 6, generator=torch.Generator().manual_seed(0)))
    for message in messages:
        error.match(message)
    assert len(str(error.value).splitlines()) == 1 + len(messages)
    # The check leaves no traces.
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in f.state_dict().items():
        assert torch.equal(value, state[name])


def unsettled(linear):
    """With power iteration that has work to do in every call."""
    with torch.no_grad():
        linear.parametrizations.weight.original.copy_(torch.randn(6, 6))
    return linear


FIT = {
    "plain": nn.GELU,
    "dropout in eval mode": lambda: nn.Dropout().eval(),
    "dropout of nothing": lambda: nn.Dropout(0.0),
    "batchnorm in eval mode": lambda: nn.BatchNorm1d(6).eval(),
    "layernorm": lambda: nn.LayerNorm(6),
    "groupnorm": lambda: nn.GroupNorm(2, 6),
    "spectral_norm": lambda: unsettled(spectral_norm(nn.Linear(6, 6), n_power_iterations=1)),
    "PyTorch's spectral_norm": lambda: unsettled(parametrizations.spectral_norm(nn.Linear(6, 6))),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "in place on its own tensors": lambda: nn.ReLU(inplace=True),
    "attention over tokens": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2)), nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True), nn.Flatten()
    ),
}


@pytest.mark.parametrize("fit", FIT.values(), ids=FIT.keys())
def test_pure_maps_pass_and_are_left_as_they_are(fit):
    f = Cell(fit())
    state = {name: value.clone() for name, value in f.state_dict().items()}
    random_state = torch.get_rng_state()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    check_map(f, torch.zeros(5, 6), x)
    with torch.inference_mode():
        check_map(f, torch.zeros(5, 6), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_map(f, torch.zeros(5, 6), x)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in f.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("problem", [tanh, imlp, conv, h_equation], ids=lambda p: p.__name__)
def test_the_problem_bank_passes(problem):
    bank = problem(torch.float32, rows=16) if problem is imlp else problem(torch.float32)
    check_map(bank.f, bank.z0)


def test_batches_that_cannot_mix():
    check_map(lambda z: 0.5 * z + z.mean(0), torch.zeros(1, 6))
    check_map(lambda z: z - z.mean(), torch.randn(3, 4), batch_dims=0)
    with pytest.raises(ValueError, match="f itself returns for one sample depends on the others"):
        check_map(lambda z: z - z.mean(1, keepdim=True), torch.randn(3, 4), batch_dims=2)
    check_map(lambda z: z - z.mean(1, keepdim=True), torch.randn(3, 4))


@pytest.mark.parametrize(("batch", "calls"), [(1, 6), (2, 8), (8, 12), (9, 14)])
def test_the_number_of_calls(batch, calls):
    """6 + 2 log2(B), rounded up."""
    counter = Counter()
    check_map(lambda z: (counter(torch.ones(1)), 0.5 * z)[1], torch.zeros(batch, 3))
    assert counter.calls == calls


def test_arguments_changed_in_place():
    relu = nn.ReLU(inplace=True)
    x = torch.randn(3, 6)
    before = x.clone()
    with pytest.raises(ValueError, match=r"ReLU changes its state 0 in place. Write z \+ x instead of z \+= x"):
        check_map(lambda z, x: relu(z) + x, torch.zeros(3, 6), x)
    with pytest.raises(ValueError, match="f itself changes its input 0 in place"):
        check_map(lambda z, x: x.clamp_(0, 1) + 0.1 * z, torch.zeros(3, 6), x)
    f = Cell(nn.Tanh())
    f.block[0] = relu
    f.forward = lambda z, x: f.block(x) + 0.1 * z
    with pytest.raises(ValueError, match=r"Cell.block.0 \(ReLU\) changes its input 0"):
        check_map(f, torch.zeros(3, 6), x)
    assert torch.equal(x, before)


def test_functions_and_pytrees():
    dropout = nn.Dropout(0.5)
    state = {"a": torch.zeros(4, 3), "b": torch.zeros(4, 2)}

    def f(z):
        return {"a": 0.1 * dropout(z["a"]), "b": z["b"]}

    with pytest.raises(ValueError, match="- Dropout returns something else in each call"):
        check_map(f, state)
    dropout.eval()
    check_map(f, state)
    with pytest.raises(ValueError, match="f itself returns something else in each call"):
        check_map(lambda z: z + torch.rand(1), state["a"])
    with pytest.raises(ValueError, match="must return the structure of the state"):
        check_map(lambda z: (z, z), state["a"])


def test_a_mask_given_as_an_input_passes():
    x = torch.randn(4, 6)
    check_map(lambda z, x, mask: 0.5 * torch.tanh(mask * z) + x, torch.zeros(4, 6), x, dropout_mask(x))


def test_a_graph_made_before_is_still_good():
    f, x = Cell(nn.BatchNorm1d(6)), torch.randn(4, 6, requires_grad=True)
    loss = f(x, x).sum()
    with pytest.raises(ValueError, match="BatchNorm1d"):
        check_map(f, torch.zeros(4, 6), x)
    loss.backward()


def test_checked_maps():
    good = FixedPointLayer(Cell(nn.Tanh()))
    bad = FixedPointLayer(Cell(nn.Dropout(0.5)), init=lambda x: torch.randn_like(x), on_failure="ignore")
    model, x = nn.Sequential(good, bad), torch.randn(4, 6)
    message = r"^In the FixedPointLayer '1': f is not a map .*\n- Cell.block.1 \(Dropout\)"
    with checked_maps(model), pytest.raises(ValueError, match=message):
        model(x)
    model.eval()
    with checked_maps(model):
        torch.manual_seed(1)
        checked = model(x)
        good(x, z0=torch.zeros(4, 6))
    torch.manual_seed(1)
    assert torch.equal(model(x), checked)


def test_checked_maps_sees_calls_and_inverses_and_leaves_roots_and_transforms_alone():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.block = Cell(nn.BatchNorm1d(6)), InvertibleResidual(lambda x: 0.3 * torch.tanh(x))

        def forward(self, x):
            y = self.block.inverse(self.block(x))
            return fixed_point(self.cell, torch.zeros_like(y), y, on_failure="ignore")

    head, x = Head(), torch.randn(4, 6)
    with checked_maps(head):
        with pytest.raises(ValueError, match=r"^In 'fixed point of cell': f is not a map .*\n- A call changes"):
            head(x)
        head.eval()(x)
    head.block.g = lambda x: 0.1 * x.mean(0, keepdim=True).expand_as(x)
    with checked_maps(head), pytest.raises(ValueError, match="^In the InvertibleResidual 'block': f is not a map"):
        head(x)
    shifted = FixedPointLayer(lambda z, x: 0.5 * z + x)
    with checked_maps(shifted):
        assert torch.vmap(shifted)(x[:, None]).shape == (4, 1, 6)


@pytest.mark.gpu
def test_on_the_gpu():
    x = torch.randn(64, 6, device="cuda")
    index = torch.randint(6, (1000,), device="cuda")
    values = torch.randn(1000, device="cuda")
    random_state = torch.cuda.get_rng_state()
    for inner in (nn.Dropout(0.1), nn.BatchNorm1d(6)):
        with pytest.raises(ValueError, match=rf"Cell.block.1 \({type(inner).__name__}\)"):
            check_map(Cell(inner).cuda(), torch.zeros_like(x), x)
    # Its sums differ by rounding from call to call.
    scattered = lambda z: z + torch.zeros_like(z).index_add_(1, index, values.expand(64, 1000)) * z  # noqa: E731
    for f in (Cell(nn.GELU()).cuda(), Cell(spectral_norm(nn.Linear(6, 6))).cuda(), lambda z, x: scattered(z) + x):
        check_map(f, torch.zeros_like(x), x)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            check_map(f, torch.zeros_like(x), x)
    assert torch.equal(torch.cuda.get_rng_state(), random_state)

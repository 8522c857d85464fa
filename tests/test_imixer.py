"""iMLP and the iMixer models: what the published code computes, what the paper counts, and the traps."""

import copy
import inspect
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import SMALL, relative_error, small, trained_somewhat
from timm.layers import Mlp
from timm.models import MlpMixer
from torch import nn
from torch.nn import functional as F

import imixer
from imixer import IMLP, IMixer, IMixerBlock, IMLPOptions, format_convergence, measure_convergence
from imixer.contraction import layer_bound
from imixer.contractive_block import JointBlock
from imixer.imixer import IMixerArguments
from imixer.imlp_options import IMLP_OPTIONS, choices
from implicit import Checkpointed, lipschitz_bound, record_solutions
from solvers import Anderson, Status

ROOT = Path(__file__).resolve().parent.parent

# PAPER.md's table, and that of the README for small images: parameters with h_ratio 1 and 2, ten classes.
PARAMETERS = {
    "imixer_s16_224": (19_073_066, 20_123_690),
    "imixer_b16_224": (62_667_322, 66_210_874),
    "imixer_l16_224": (219_788_906, 232_384_106),
    "imixer_s32_224": (19_649_426, 20_700_050),
    "imixer_b32_224": (63_080_278, 66_623_830),
    "imixer_l32_224": (218_532_002, 231_127_202),
    "imixer_s4_32": (4_625_162, 4_888_330),
    "imixer_ti4_32": (162_506, 170_826),
}


@pytest.mark.parametrize(
    "name",
    [name if "_s" in name or "_ti" in name else pytest.param(name, marks=pytest.mark.long) for name in PARAMETERS],
)
def test_parameter_counts(name):
    for h_ratio, expected in zip((1.0, 2.0), PARAMETERS[name], strict=True):
        model = timm.create_model(name, num_classes=10, h_ratio=h_ratio, device="meta")
        assert sum(p.numel() for p in model.parameters()) == expected


def test_imlp_is_the_papers_formula():
    imlp = IMLP(7, 6, h_ratio=1.5, n_iter=3, coeff=0.5).eval()
    x = torch.randn(2, 4, 7)
    y = F.linear(x, imlp.fc1.weight, imlp.fc1.bias)
    z = y
    w1, w2 = (
        layer.parametrizations.weight.original
        / max(1, torch.linalg.matrix_norm(layer.parametrizations.weight.original, 2) / 0.5)
        for layer in (imlp.fc_sn1, imlp.fc_sn2)
    )
    assert w1.shape == (9, 6)
    for _ in range(3):
        z = y + F.linear(F.gelu(F.linear(F.gelu(z), w1, imlp.fc_sn1.bias)), w2, imlp.fc_sn2.bias)
    expected = F.linear(F.gelu(z), imlp.fc2.weight, imlp.fc2.bias)
    assert torch.allclose(imlp(x), expected, atol=1e-5)


def test_weights_are_computed_once_a_forward():
    """The power iteration advances once, and all steps of the solve use the same weights, bit for bit."""
    imlp = IMLP(8, 8, n_iter=5, n_power=1)
    for layer in imlp.normalized_layers:
        layer.parametrizations.weight.original.data.normal_()
    computed = []
    for layer in imlp.normalized_layers:
        layer.parametrizations.weight[0].register_forward_hook(lambda *call: computed.append(call[-1]))
    used = []
    imlp.fixed_point.f.register_forward_hook(lambda _m, inputs, _o: used.append((inputs[2].up, inputs[2].down)))
    imlp(torch.randn(3, 8))
    assert len(computed) == 2
    assert len(used) == 5
    assert all(torch.equal(w1, computed[0]) and torch.equal(w2, computed[1]) for w1, w2 in used)


def test_initial_weights_are_xavier_uniform():
    """timm's initialization writes to module.weight, which under a parametrization is a computed copy."""
    torch.manual_seed(0)
    model = timm.create_model("imixer_s16_224", num_classes=10)
    for name, parameter in model.named_parameters():
        if ".mlp_tokens." not in name and ".mlp_channels." not in name:
            continue
        if name.endswith("bias"):
            assert 1e-7 < parameter.std() < 1e-5, name
            continue
        bound = math.sqrt(6 / sum(parameter.shape))
        assert parameter.abs().max() <= bound, name
        assert parameter.abs().max() > 0.99 * bound, name
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
        assert abs(parameter.mean().item()) < 0.02 * bound, name


def test_normalized_before_any_training():
    model = small().eval()
    for module in model.modules():
        if isinstance(module, IMLP):
            for layer in module.normalized_layers:
                original = layer.parametrizations.weight.original
                assert torch.linalg.matrix_norm(original, 2) > 1
                assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(0.9, rel=0.01)


def test_everything_but_the_token_mixer_is_timms():
    model = small()
    assert isinstance(model, MlpMixer)
    mixer = MlpMixer(**SMALL)
    theirs = {name for name, _ in mixer.named_parameters() if "mlp_tokens" not in name}
    assert theirs == {name for name, _ in model.named_parameters() if "mlp_tokens" not in name}


def test_overrides():
    """Every architecture argument can be given in the same call."""
    model = timm.create_model("imixer_s16_224", img_size=8, patch_size=2, num_blocks=3, embed_dim=16, in_chans=1)
    assert len(model.blocks) == 3
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 1000)


# A value of each option that is not its default, and where it ends up.
CHANGED: dict[str, tuple[Any, Callable[[Any], object]]] = {
    "n_iter": (9, lambda imlp: imlp.fixed_point.max_steps),
    "solver": (Anderson(memory=3), lambda imlp: imlp.fixed_point.solver),
    "backward": (Checkpointed(), lambda imlp: imlp.fixed_point.backward),
    "rtol": (1e-3, lambda imlp: imlp.fixed_point.rtol),
    "h_ratio": (1.5, lambda imlp: imlp.fc_sn1.out_features / imlp.fc_sn1.in_features),
    "n_power": (3, lambda imlp: imlp.fc_sn1.parametrizations.weight[0].n_power_iterations),
    "coeff": (0.7, lambda imlp: imlp.fc_sn2.parametrizations.weight[0].coeff),
    "hidden_layers": (3, lambda imlp: len(imlp.normalized_layers) / 2 + 1),
    "tied": (True, lambda imlp: not hasattr(imlp, "fc_sn2")),
    "norm": ("weight", lambda imlp: "weight" if hasattr(imlp.fc_sn1.parametrizations.weight, "original0") else "other"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_each_option_reaches_every_imlp(name):
    value, found = CHANGED[name]
    assert value != IMLP_OPTIONS[name].default
    for imlp in (IMLP(8, **{name: value}), *(block.mlp_tokens for block in small(**{name: value}).blocks)):
        assert found(imlp) == value
        assert imlp.options == {key: option.default for key, option in IMLP_OPTIONS.items()} | {name: value}


def test_options_that_show_only_with_others():
    assert CHANGED.keys() == IMLP_OPTIONS.keys() - {"hidden_solve", "contraction"}
    imlp = small(hidden_layers=3, hidden_solve="joint", contraction="certified").blocks[1].mlp_tokens
    assert isinstance(imlp.fixed_point.f, JointBlock)
    assert imlp.fc_sn1.parametrizations.weight[0].coeff == layer_bound(0.9, float(lipschitz_bound(nn.GELU())), 3)


@pytest.mark.parametrize("cls", [IMLP, IMixer])
def test_help_lists_the_options(cls):
    listed = inspect.signature(cls).parameters
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in listed.values())
    for name, option in IMLP_OPTIONS.items():
        assert listed[name].default == option.default
        assert f"{name}: {option.meaning}" in IMLPOptions.__doc__


@pytest.mark.parametrize("page", ["README.md", "docs/imixer.md"])
def test_documents_list_the_options(page):
    rows = re.findall(r"^\| `(\w+)` \| `?(.+?)`? \|", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    defaults = {name: default for name, default in reversed(rows) if name in IMLP_OPTIONS}  # the first table
    assert defaults == {name: repr(option.default).replace("'", '"') for name, option in IMLP_OPTIONS.items()}


def test_documents_list_the_norms():
    listed = re.findall(r'^\| `"(\w+)"` \|', (ROOT / "docs" / "imixer.md").read_text("utf-8"), re.MULTILINE)
    assert tuple(listed) == choices("norm")


def test_timms_arguments_are_typed_as_timm_has_them():
    theirs = inspect.signature(MlpMixer).parameters.keys()
    assert IMixerArguments.__annotations__.keys() - IMLP_OPTIONS.keys() <= theirs - {"block_layer"}


@pytest.mark.parametrize(
    "make", [partial(IMLP, 4), small, partial(IMixer, num_blocks=1)], ids=["IMLP", "timm", "class"]
)
def test_a_misspelled_option_is_refused_with_the_names_that_there_are(make):
    with pytest.raises(TypeError, match="'h_ration'; did you mean 'h_ratio'.*n_iter, .*coeff.*contraction"):
        make(h_ration=2.0)
    with pytest.raises(TypeError, match=r"'zzz'\. The keyword arguments are .*n_iter, "):
        make(zzz=2.0)


BAD_VALUES: dict[str, tuple[object, ...]] = {
    "n_iter": (0, -1, 2.0, True, None, "2"),
    "n_power": (0, 1.5, "8"),
    "hidden_layers": (0, -1, 2.0, True),
    "h_ratio": (0, -1.0, math.nan, math.inf, True, "2", None),
    "coeff": (0.0, -0.5, math.nan, "0.9"),
    "rtol": (-1e-3, math.nan, math.inf, "1e-3", True),
    "tied": (1, "yes", None),
    "norm": ("Spectral", None, 3),
    "hidden_solve": ("both", [], None),
    "contraction": ("certain", True),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {re.escape(repr(value))}\."):
        IMLP(4, **{name: value})


def test_the_block_takes_any_token_mixer():
    block = IMixerBlock(6, 4, token_mixer=Mlp, drop=0.25)
    assert isinstance(block.mlp_tokens, Mlp)
    assert block.mlp_tokens.drop1.p == 0.25
    assert isinstance(IMixerBlock(6, 4).mlp_tokens, IMLP)
    assert IMixerBlock(6, 4, mlp_ratio=2.0).mlp_tokens.fc1.out_features == 12


def test_refusals():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for imixer_s16_224"):
        timm.create_model("imixer_s16_224", pretrained=True, num_blocks=1)
    with pytest.raises(ValueError, match="img_size=18 is no multiple of patch_size=4"):
        small(img_size=18)
    with pytest.raises(ValueError, match="no solver 'secant'"):
        small(solver="secant")
    with pytest.raises(ValueError, match="h_ratio=0.01 leaves the block of a state of size 12"):
        small(h_ratio=0.01)


OPTIONS = {
    "paper": {},
    "anderson unrolled": {"solver": "anderson", "n_iter": 4},
    "implicit": {"backward": "implicit", "n_iter": 30, "rtol": 1e-3},
    "implicit anderson": {"backward": "implicit", "solver": Anderson(memory=3), "n_iter": 20, "rtol": 1e-3},
    "implicit broyden": {"backward": "implicit", "solver": "broyden", "n_iter": 20, "rtol": 1e-3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_copies_and_state_dicts(options):
    model = trained_somewhat(small(**options)).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    fresh = small(**options).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_autocast_keeps_the_state_in_float32():
    model = trained_somewhat(small()).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    seen = []
    for module in model.modules():
        if isinstance(module, IMLP):
            module.fixed_point.f.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16), record_solutions(model) as record:
        found = model(x)
    assert relative_error(found.float(), expected) < 0.05
    assert record["blocks.0.mlp_tokens.fixed_point"][0].residual.dtype == torch.float32


def test_imlp_without_bias_and_with_other_shapes():
    imlp = IMLP(5, 4, 3, bias=False, act_layer=nn.Tanh)
    assert imlp(torch.randn(6, 5)).shape == (6, 3)
    assert imlp(torch.randn(2, 3, 6, 5)).shape == (2, 3, 6, 3)
    assert imlp(torch.randn(0, 5)).shape == (0, 3)
    assert all(not name.endswith("bias") for name, _ in imlp.named_parameters())


def test_the_worst_residual_is_that_of_the_worst_row():
    model = trained_somewhat(small(n_iter=3)).eval()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad(), record_solutions(model) as record:
        model(images)
    for row in measure_convergence(model, images):
        residual = record[f"{row.name}.fixed_point"][0].residual
        assert row.worst_residual == residual.amax().item()
        assert row.median_residual == residual.median().item()


def test_more_steps_tend_to_the_fixed_point():
    model = trained_somewhat(small(n_iter=60)).eval()
    with torch.no_grad(), record_solutions(model) as record:
        model(torch.randn(2, 3, 16, 16))
    for solutions in record.values():
        assert (solutions[0].status == Status.UNTESTED).all()
        assert solutions[0].residual.max() < 1e-4


def test_measure_convergence():
    model = trained_somewhat(small(n_iter=3)).train()
    images = torch.randn(4, 3, 16, 16)
    rows = measure_convergence(model, images)
    assert model.training  # put back as it was
    assert [row.name for row in rows] == ["blocks.0.mlp_tokens", "blocks.1.mlp_tokens"]
    for row, imlp in zip(rows, (block.mlp_tokens for block in model.blocks), strict=True):
        assert row.n_iter == 3
        assert row.median_residual <= row.worst_residual < 1
        assert 0 < row.rate < 1
        assert 3 < row.steps_needed < 100
        weight = imlp.fc_sn1.parametrizations.weight.original
        assert row.sigmas[0] == pytest.approx(torch.linalg.matrix_norm(weight, 2).item())
        assert len(row.sigmas) == 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.norm.eval()
    measure_convergence(model, images)
    assert not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    table = format_convergence(rows)
    assert table.splitlines()[2].startswith("blocks.0.mlp_tokens      3")
    deep = trained_somewhat(small(hidden_layers=3, hidden_solve="joint")).double()
    rows = measure_convergence(deep, images.double())
    assert [len(row.sigmas) for row in rows] == [4, 4]
    assert format_convergence(rows).splitlines()[0].endswith("sigma 1  sigma 2  sigma 3  sigma 4")
    assert "not reached" in format_convergence(measure_convergence(model, images, max_steps=2))
    with pytest.raises(ValueError, match="no IMLP.*got a Linear"):
        measure_convergence(nn.Linear(2, 2), images)


def test_package_exports_the_models():
    assert imixer.IMixer is IMixer
    assert isinstance(small(), IMixer)

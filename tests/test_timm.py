"""The models as timm's own: what its tests ask of every registered model, and what its tools do with one."""

import copy

import pytest
import timm
import torch
from small_models import relative_error, trained_somewhat
from timm.data import resolve_model_data_config
from timm.models import FeatureGraphNet, GraphExtractNet, group_parameters, load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F

from imixer import IMLP, IMixer

NAMES = timm.list_models("imixer*")
BLOCKS, WIDTH = 3, 16


def tiny(name="imixer_ti4_32", **overrides):
    """A model of few, narrow blocks and a small image, with the patch size of its name."""
    side = 64 if timm.get_pretrained_cfg(name).input_size[-1] == 224 else 16
    return timm.create_model(name, **{"img_size": side, "num_blocks": BLOCKS, "embed_dim": WIDTH, **overrides})


def images(model, batch=2):
    return torch.randn(batch, model.in_chans, *model.stem.img_size)


def patch_of(name):
    return int(name.split("_")[1].lstrip("tisbl"))


def gradients(model, output):
    """By name, of a loss that every part of the output has its own say in."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_all_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


# What is registered


def test_listed():
    assert {f"imixer_{size}_224" for size in ("s32", "s16", "b32", "b16", "l32", "l16")} < set(NAMES)
    assert timm.list_models(module="imixer") == NAMES
    assert timm.list_models("imixer*", pretrained=True) == ["imixer_ti4_32.cifar10"]
    assert isinstance(timm.create_model(f"{NAMES[0]}.untrained", device="meta"), IMixer)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if "_l" in name else name for name in NAMES]
)
def test_default_cfg(name):
    """The architecture as it is registered, and that the names in the cfg are those of its modules."""
    model = timm.create_model(name, device="meta")
    cfg = model.default_cfg
    modules = dict(model.named_modules())
    assert isinstance(modules[cfg["first_conv"]], nn.Conv2d)
    assert modules[cfg["classifier"]] is model.get_classifier()
    assert (cfg["architecture"], cfg["tag"], cfg["pool_size"]) == (
        name,
        "cifar10" if name == "imixer_ti4_32" else "untrained",
        None,
    )
    assert cfg["fixed_input_size"]
    assert cfg["input_size"] == (model.in_chans, *model.stem.img_size) == (3, *[int(name.split("_")[2])] * 2)
    assert model.stem.patch_size == (patch_of(name),) * 2
    assert model(torch.empty(2, *cfg["input_size"], device="meta")).shape == (2, cfg["num_classes"])
    found = resolve_model_data_config(model)
    assert found["input_size"] == cfg["input_size"]
    # Images are prepared as for timm's Mixers, except that small ones are not cropped.
    theirs = resolve_model_data_config(timm.create_model("mixer_s16_224.untrained", device="meta"))
    of_weights = () if cfg["tag"] == "untrained" else ("mean", "std")
    for setting in {"interpolation", "mean", "std", "crop_mode"}.difference(of_weights):
        assert found[setting] == theirs[setting]
    assert found["crop_pct"] == (theirs["crop_pct"] if cfg["input_size"][1] == 224 else 1.0)


# Forward and backward


@pytest.mark.parametrize("name", NAMES)
def test_forward(name):
    model = tiny(name).eval()
    x = images(model)
    features = model.forward_features(x)
    assert features.shape == (2, model.stem.num_patches, model.num_features)
    logits = model(x)
    assert logits.shape == (2, model.num_classes)
    assert logits.isfinite().all()
    assert torch.equal(model.forward_head(features), logits)
    assert torch.equal(model.forward_head(features, pre_logits=True), features.mean(1))


TOLERANCE = {"rtol": 1e-3, "n_iter": 30}
MODES = {
    "unrolled": {},
    "checkpointed": {"n_iter": 4},
    "implicit": TOLERANCE,
    "phantom": TOLERANCE,
    "jfb": TOLERANCE,
    "neumann": TOLERANCE,
    "shine": {"solver": "broyden", **TOLERANCE},
    "auto": TOLERANCE,
    "auto, fixed steps": {},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_parameter_gets_a_gradient(mode):
    model = trained_somewhat(tiny(num_classes=42, backward=mode.split(",")[0], **MODES[mode])).train()
    logits = model(images(model))
    assert logits.shape == (2, 42)
    for name, gradient in gradients(model, logits).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


@pytest.mark.parametrize("name", NAMES)
def test_every_model_trains(name):
    model = trained_somewhat(tiny(name)).train()
    assert all(gradient.any() for gradient in gradients(model, model(images(model))).values())


CALLS = {
    "logits": lambda model, x: model(x),
    "intermediates": lambda model, x: model.forward_intermediates(x, intermediates_only=True)[0],
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("mode", ["unrolled", "checkpointed", "implicit"])
def test_gradient_checkpointing_changes_nothing(mode, training, call):
    """Neither outputs nor gradients nor buffers: recomputing a block must not advance its power iteration again."""
    plain = trained_somewhat(tiny(backward=mode, n_power=1)).train(training)
    for name, vector in plain.named_buffers():  # far from those of the weights, so that each iteration is seen
        vector.copy_(F.normalize(torch.randn_like(vector), dim=0) if name.endswith((".u", ".v")) else vector)
    other = copy.deepcopy(plain)
    other.set_grad_checkpointing()
    calls = []
    other.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    x = images(plain)
    for _ in range(2):
        found, expected = call(other, x), call(plain, x)
        assert torch.equal(found, expected)
        theirs, ours = gradients(plain, expected), gradients(other, found)
        used = {name for name, gradient in theirs.items() if gradient is not None}
        assert_all_close({name: ours[name] for name in used}, {name: theirs[name] for name in used})
        for one, another in zip(plain.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(one, another)
    assert len(calls) == 4
    other.set_grad_checkpointing(False)
    assert torch.equal(call(other.eval(), x), call(plain.eval(), x))


# Features


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    model = trained_somewhat(tiny(name)).eval()
    x = images(model)
    for out_indices, taken in ((None, [0, 1, 2]), ((0, 2), [0, 2]), ((-1,), [2]), (2, [1, 2])):
        backbone = tiny(name, features_only=True, **({} if out_indices is None else {"out_indices": out_indices}))
        backbone.eval().load_state_dict({f"model.{key}": value for key, value in model.state_dict().items()}, False)
        assert backbone.feature_info.channels() == [WIDTH] * len(taken)
        assert backbone.feature_info.reduction() == [patch_of(name)] * len(taken)
        assert backbone.feature_info.module_name() == [f"blocks.{index}" for index in taken]
        for found, expected in zip(
            backbone(x), model.forward_intermediates(x, taken, intermediates_only=True), strict=True
        ):
            assert found.shape == (2, WIDTH, *model.stem.grid_size)
            assert torch.equal(found, expected)


def test_forward_intermediates():
    model = trained_somewhat(tiny(img_size=(8, 16))).eval()
    x = images(model)
    tokens = [model.stem(x)]
    for block in model.blocks:
        tokens.append(block(tokens[-1]))
    del tokens[0]
    final, found = model.forward_intermediates(x, output_fmt="NLC")
    assert torch.equal(final, model.forward_features(x))
    assert all(map(torch.equal, found, tokens))
    for indices, taken in ((2, [1, 2]), ([0, 2], [0, 2]), ([-2], [1])):
        found = model.forward_intermediates(x, indices, output_fmt="NLC", norm=True, intermediates_only=True)
        assert len(found) == len(taken)
        assert all(torch.equal(a, model.norm(tokens[index])) for a, index in zip(found, taken, strict=True))
    (image,) = model.forward_intermediates(x, [1], intermediates_only=True)
    assert torch.equal(image.flatten(2).mT, tokens[1])
    assert image.shape == (2, WIDTH, 2, 4)
    model.blocks[2].register_forward_hook(lambda *_: pytest.fail("a block that is not needed was run"))
    model.forward_intermediates(x, [0, 1], stop_early=True, intermediates_only=True)
    with pytest.raises(AssertionError, match="feature index 3 is out of range"):
        model.forward_intermediates(x, [3])


@pytest.mark.parametrize("prune_norm", [False, True])
def test_prune_intermediate_layers(prune_norm):
    model = trained_somewhat(tiny()).eval()
    x = images(model)
    expected = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1], prune_norm=prune_norm) == [0, 1]
    assert len(model.blocks) == 2
    assert isinstance(model.norm, nn.Identity) == prune_norm
    assert isinstance(model.get_classifier(), nn.Identity)
    final, found = model.forward_intermediates(x, [0, 1])
    assert all(map(torch.equal, found, expected))
    assert final.shape == (2, model.stem.num_patches, WIDTH)


def test_classifier():
    model = tiny(num_classes=0).eval()
    x = images(model)
    pooled = model.forward_features(x).mean(1)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(7)
    assert (model.num_classes, model.get_classifier().out_features) == (7, 7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(x), model.forward_features(x))
    assert tiny(num_classes=0, global_pool="")(x).shape == (2, model.stem.num_patches, WIDTH)
    model.double().reset_classifier(3, "avg")
    assert model(x.double()).shape == (2, 3)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_symbolic_tracing(training):
    """As timm's tests do it, with its list of modules that are leaves: values, gradients and features."""
    model = trained_somewhat(tiny()).train(training)
    traced, graph = GraphExtractNet(copy.deepcopy(model), ["head"]), FeatureGraphNet(copy.deepcopy(model), (0, 2))
    traced.train(training)
    graph.train(training)
    assert any(isinstance(module, IMLP) for module in traced.modules())
    x = images(model)
    features = model.forward_intermediates(x, [0, 2], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(graph(x), features)
    model.load_state_dict(traced.graph_module.state_dict())  # the features have advanced the power iteration
    found, expected = traced(x), model(x)
    torch.testing.assert_close(found, expected)
    theirs = gradients(traced, found)
    for name, gradient in gradients(model, expected).items():
        torch.testing.assert_close(theirs[f"graph_module.{name}"], gradient)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_symbolic_tracing_without_timms_list_of_leaves(training):
    model = trained_somewhat(tiny()).train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert any(isinstance(module, IMLP) for module in traced.modules())
    x = images(model)
    found, expected = traced(x), model(x)
    assert torch.equal(found, expected)
    theirs = gradients(traced, found)
    for name, gradient in gradients(model, expected).items():
        torch.testing.assert_close(theirs[name], gradient)


# Arguments


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_images(in_chans):
    model = tiny("imixer_s32_224", in_chans=in_chans, img_size=(64, 96)).eval()
    assert model.stem.grid_size == (2, 3)
    assert model(images(model)).shape == (2, 1000)
    assert model.forward_intermediates(images(model))[1][0].shape == (2, WIDTH, 2, 3)
    with pytest.raises(AssertionError, match=r"Input height \(96\) doesn't match model \(64\)"):
        model(images(model).mT)


def test_drop_rates():
    model = tiny(drop_rate=0.1, proj_drop_rate=0.2, drop_path_rate=0.3)
    assert model.head_drop.p == 0.1
    for block in model.blocks:
        assert block.mlp_tokens.drop1.p == block.mlp_tokens.drop2.p == block.mlp_channels.drop1.p == 0.2
        assert block.drop_path.drop_prob == 0.3
    x = images(model)
    assert not torch.equal(model.forward_features(x), model.forward_features(x))
    model.eval()
    assert torch.equal(model.forward_features(x), model.forward_features(x))


def test_device_and_dtype():
    model = tiny(device="meta", dtype=torch.float64)
    tensors = [*model.parameters(), *model.buffers()]
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("meta", torch.float64)}
    assert model(torch.empty(2, 3, 16, 16, device="meta", dtype=torch.float64)).shape == (2, 10)
    model = trained_somewhat(tiny()).eval()
    half = tiny(dtype=torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    x = images(model)
    found = half(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), model(x)) < 0.05
    assert all(gradient.dtype == torch.bfloat16 and gradient.any() for gradient in gradients(half, found).values())


# Weights


@pytest.mark.parametrize("name", [name for name in NAMES if name != "imixer_ti4_32"])
@pytest.mark.parametrize("options", [{}, {"features_only": True}], ids=["model", "features"])
def test_pretrained_is_refused(name, options):
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        tiny(name, pretrained=True, **options)


def test_weights_from_a_file(tmp_path):
    model = trained_somewhat(tiny()).eval()
    x = images(model)
    file = str(tmp_path / "model.pt")
    torch.save(model.state_dict(), file)
    assert torch.equal(tiny(checkpoint_path=file).eval()(x), model(x))
    other = tiny().eval()
    load_checkpoint(other, file)
    assert torch.equal(other(x), model(x))
    from_file = {"pretrained": True, "pretrained_cfg_overlay": {"file": file}}
    assert torch.equal(tiny(**from_file).eval()(x), model(x))
    backbone = tiny(features_only=True, **from_file).eval()
    assert all(map(torch.equal, backbone(x), model.forward_intermediates(x, intermediates_only=True)))
    # timm adapts the first and the last layer, which it finds by the names in the cfg.
    grey = tiny(in_chans=1, num_classes=3, **from_file)
    torch.testing.assert_close(grey.stem.proj.weight, model.stem.proj.weight.sum(1, keepdim=True))
    assert torch.equal(grey.blocks[1].mlp_tokens.fc1.weight, model.blocks[1].mlp_tokens.fc1.weight)
    assert grey.head.weight.shape == (3, WIDTH)


def test_averaged_weights():
    """timm averages buffers too, so the average has singular vectors near enough to its own."""
    model = trained_somewhat(tiny()).train()
    average = ModelEmaV3(model, decay=0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(images(model, 8)), torch.arange(8)).backward()
        optimizer.step()
        average.update(model, step)
    assert average.module(images(model)).isfinite().all()
    for block, other in zip(model.blocks, average.module.blocks, strict=True):
        for layer, averaged in zip(block.mlp_tokens.normalized_layers, other.mlp_tokens.normalized_layers, strict=True):
            assert not torch.equal(layer.weight, averaged.weight)
            assert torch.linalg.matrix_norm(averaged.weight, 2) < 0.9 * 1.01


# Optimizers


def test_weight_decay_is_for_matrices():
    """The normalized weights, under the names of their parametrization, count with the others; nothing is exempt."""
    model = tiny()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert not hasattr(model, "no_weight_decay")
    for name, parameter in model.named_parameters():
        vector = name.endswith("bias") or "norm" in name.replace("parametrizations", "")
        assert decay[id(parameter)] == (0 if vector else 0.05), name
    assert any(name.endswith("original") for name, _ in model.named_parameters())


def test_layer_decay():
    model = tiny()
    groups = group_parameters(model, model.group_matcher())
    assert {name for names in groups.values() for name in names} == {name for name, _ in model.named_parameters()}
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.5)
    scale = {id(parameter): group["lr_scale"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        # From the head downwards; the last norm belongs to the last block.
        depth = {"head": 0, "norm": 1, "stem": BLOCKS + 1}.get(parts[0])
        expected = 0.5 ** (BLOCKS - int(parts[1]) if depth is None else depth)
        assert scale[id(parameter)] == expected, name

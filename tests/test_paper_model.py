"""The paper's model in training mode, beside one that is written out from PAPER.md's formulas."""

import math

import pytest
import torch
from small_models import relative_error, small, trained_somewhat
from torch.nn import functional as F


class WrittenOut:
    """The paper's model, in training mode, from the tensors of a state dict: every random draw in its order.

    Args:
        tensors: Parameters and buffers by name; gradients reach them.
    """

    def __init__(self, tensors, *, n_iter, coeff, proj_drop, drop_path, drop):
        self.tensors = tensors
        self.n_iter, self.coeff = n_iter, coeff
        self.proj_drop, self.drop_path, self.drop = proj_drop, drop_path, drop

    def linear(self, name, x):
        return x @ self.tensors[f"{name}.weight"].mT + self.tensors[f"{name}.bias"]

    def normalized_linear(self, name, x):
        stem = f"{name}.parametrizations.weight"
        weight, u, v = (self.tensors[f"{stem}.{part}"] for part in ("original", "0.u", "0.v"))
        sigma = u.detach() @ weight @ v.detach()
        return x @ (weight / (sigma / self.coeff).clamp(min=1)).mT + self.tensors[f"{name}.bias"]

    def layer_norm(self, name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def gelu(self, x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def imlp(self, name, x):
        y = z = self.linear(f"{name}.fc1", x)
        for _ in range(self.n_iter):
            z = y + self.normalized_linear(
                f"{name}.fc_sn2", self.gelu(self.normalized_linear(f"{name}.fc_sn1", self.gelu(z)))
            )
        return self.dropout(self.linear(f"{name}.fc2", self.dropout(self.gelu(z))))

    def mlp(self, name, x):
        return self.dropout(self.linear(f"{name}.fc2", self.dropout(self.gelu(self.linear(f"{name}.fc1", x)))))

    def dropout(self, x):
        return F.dropout(x.contiguous(), self.proj_drop)  # draws are in the order of memory

    def skipped_at_random(self, x):
        keep = 1 - self.drop_path
        if keep == 1:
            return x  # without a draw, as in timm
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep) / keep

    def __call__(self, images, num_blocks):
        weight = self.tensors["stem.proj.weight"]  # (D, C, P, P)
        patches = F.unfold(images, weight.shape[-1], stride=weight.shape[-1]).mT  # (B, tokens, C P P)
        x = patches @ weight.flatten(1).mT + self.tensors["stem.proj.bias"]
        for block in range(num_blocks):
            tokens = self.layer_norm(f"blocks.{block}.norm1", x).mT  # (B, D, tokens)
            x = x + self.skipped_at_random(self.imlp(f"blocks.{block}.mlp_tokens", tokens).mT)
            channels = self.layer_norm(f"blocks.{block}.norm2", x)
            x = x + self.skipped_at_random(self.mlp(f"blocks.{block}.mlp_channels", channels))
        pooled = self.layer_norm("norm", x).mean(1)
        return self.linear("head", F.dropout(pooled, self.drop))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
@pytest.mark.parametrize(
    "rates",
    [{}, {"proj_drop": 0.3}, {"drop_path": 0.4}, {"drop": 0.5}, {"proj_drop": 0.2, "drop_path": 0.3, "drop": 0.1}],
)
def test_training_is_the_papers_model_with_every_dropout_in_its_place(rates, checkpointing):
    """Equal draws at equal seeds, so that a dropout that is missing, moved or of another rate is seen."""
    proj_drop, drop_path, drop = (rates.get(name, 0.0) for name in ("proj_drop", "drop_path", "drop"))
    options = {"n_iter": 3, "coeff": 0.7, "num_blocks": 3}
    model = small(**options, proj_drop_rate=proj_drop, drop_path_rate=drop_path, drop_rate=drop)
    trained_somewhat(model).train()
    for name, vector in model.named_buffers():
        assert name.endswith((".u", ".v"))
        vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(4, 3, 16, 16)
    torch.manual_seed(1)
    logits = model(images)
    logits.sin().sum().backward()
    # The singular vectors have advanced before the blocks were computed.
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, _ in model.named_parameters():
        tensors[name].requires_grad_()
    torch.manual_seed(1)
    written_out = WrittenOut(tensors, n_iter=3, coeff=0.7, proj_drop=proj_drop, drop_path=drop_path, drop=drop)
    expected = written_out(images, num_blocks=3)
    expected.sin().sum().backward()
    assert relative_error(logits, expected) < 1e-10
    for name, parameter in model.named_parameters():
        # The gradient of a bias which a later norm removes is zero except for rounding.
        assert (parameter.grad - tensors[name].grad).norm() < 1e-9 * tensors[name].grad.norm() + 1e-12, name

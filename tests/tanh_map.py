"""A small map that contracts."""

import torch
from torch import nn

from implicit import spectral_norm


class TanhMap(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        with torch.no_grad():
            self.linear.weight.mul_(0.6 / torch.linalg.matrix_norm(self.linear.weight, 2))
        if norm:
            spectral_norm(self.linear, coeff=0.5)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)

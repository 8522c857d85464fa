"""Training under DistributedDataParallel: the losses of a single process at the same global batch."""

import datetime
import multiprocessing

import pytest
import torch
from torch import nn

from implicit import FixedPointLayer, spectral_norm

STEPS, BATCH, PROCESSES = 6, 8, 2


class Map(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = spectral_norm(nn.Linear(6, 6), coeff=0.5)

    def forward(self, z, x):
        return torch.tanh(self.linear(z)) + x


def make_model(backward):
    """Two layers, one with normalized weights that track the power iteration and one without."""
    torch.manual_seed(0)
    free = nn.Linear(6, 6)
    with torch.no_grad():
        free.weight.mul_(0.3)
    return nn.Sequential(
        nn.Linear(4, 6),
        FixedPointLayer(Map(), backward=backward, rtol=1e-6),
        FixedPointLayer(Free(free), backward=backward, rtol=1e-6),
        nn.Linear(6, 1),
    )


class Free(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


def losses(model, part):
    """The losses of a few steps of training on the samples ``part`` of every batch."""
    torch.manual_seed(1)
    x, y = torch.randn(STEPS, BATCH, 4), torch.randn(STEPS, BATCH, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(STEPS):
        loss = nn.functional.mse_loss(model(x[step, part]), y[step, part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def work(rank, rendezvous, backward, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        model = nn.parallel.DistributedDataParallel(make_model(backward))
        size = BATCH // PROCESSES
        found = losses(model, slice(rank * size, (rank + 1) * size))
        results.put((rank, found, [p.detach().tolist() for p in model.parameters()]))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.long
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("backward", ["implicit", pytest.param("unrolled", marks=pytest.mark.long)])
def test_losses_are_those_of_one_process(backward, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=work, args=(rank, tmp_path / "rendezvous", backward, results), daemon=True)
        for rank in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    try:
        found = sorted(results.get(timeout=90) for _ in processes)
        for process in processes:
            process.join(timeout=30)
    finally:
        for process in processes:
            process.kill()
    model = make_model(backward)
    expected = losses(model, slice(None))
    mean = [sum(step) / PROCESSES for step in zip(*(curve for _, curve, _ in found), strict=True)]
    assert mean == pytest.approx(expected, rel=1e-4)
    assert expected[-1] != expected[0]
    for _, _, parameters in found:
        for a, b in zip(parameters, model.parameters(), strict=True):
            assert torch.allclose(torch.tensor(a), b, rtol=1e-3, atol=1e-5)

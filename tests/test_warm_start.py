"""Solutions kept by the sample's index as the starts of the next epoch."""

import copy

import pytest
import torch
from torch import nn

from implicit import FixedPointLayer, WarmStart


class TanhMap(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.a = nn.Linear(size, size)
        with torch.no_grad():
            self.a.weight.mul_(0.9 / torch.linalg.matrix_norm(self.a.weight, 2))

    def forward(self, z, x):
        return torch.tanh(self.a(z) + x)


def test_the_second_epoch_needs_fewer_calls():
    """In a training, where the weights move between the epochs; a sample that was not seen starts cold."""
    data = torch.randn(40, 8)
    layer = FixedPointLayer(TanhMap(8), solver="picard", rtol=1e-5, max_steps=300)
    warm = WarmStart(len(data), like=torch.empty(0, 8))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    calls = []
    for _ in range(3):
        calls.append(0)
        for index in torch.randperm(len(data)).split(10):
            x = data[index]
            z, solution = layer(x, z0=warm.get(index, layer.start(x)), return_solution=True)
            warm[index] = z
            calls[-1] += solution.num_evals
            optimizer.zero_grad()
            z.square().mean().backward()
            optimizer.step()
    assert warm.seen.all()
    assert calls[1] < 0.8 * calls[0]
    assert calls[2] < 0.8 * calls[0]


def test_get_and_set():
    warm = WarmStart(5, like=torch.empty(0, 2))
    default = torch.full((3, 2), -1.0)
    assert torch.equal(warm.get(torch.tensor([0, 1, 2]), default), default)
    warm[torch.tensor([3, 1])] = torch.tensor([[3.0, 3], [1, 1]])
    found = warm.get(torch.tensor([1, 2, 3]), default)
    assert torch.equal(found, torch.tensor([[1.0, 1], [-1, -1], [3, 3]]))
    assert warm.seen.tolist() == [False, True, False, True, False]
    assert repr(warm) == "WarmStart(2 of 5 samples, float32 (2,))"
    warm[torch.tensor([1], dtype=torch.uint8)] = torch.full((1, 2), 7.0)
    assert torch.equal(warm.get(torch.tensor([1]), default[:1]), torch.full((1, 2), 7.0))
    warm.clear()
    assert torch.equal(warm.get(torch.tensor([1, 2, 3]), default), default)


def test_pytrees_and_other_precisions():
    """What comes back is like the default, whatever it is stored as."""
    state = {"a": torch.randn(2, 3), "b": [torch.randn(2, 4, 5, dtype=torch.float64)]}
    warm = WarmStart(6, like={"a": state["a"].bfloat16(), "b": [state["b"][0].half()]})
    index = torch.tensor([5, 0])
    warm[index] = state
    default = {"a": torch.zeros(3, 3), "b": [torch.zeros(3, 4, 5, dtype=torch.float64)]}
    found = warm.get(torch.tensor([0, 5, 1]), default)
    assert found["a"].dtype == torch.float32
    assert found["b"][0].dtype == torch.float64
    assert torch.allclose(found["a"][:2], state["a"].flip(0), rtol=1e-2)
    assert torch.allclose(found["b"][0][:2], state["b"][0].flip(0), rtol=1e-3, atol=1e-5)
    assert not found["a"][2].any()


def test_states_of_one_number_per_sample():
    warm = WarmStart(5, like={"a": torch.empty(0), "b": torch.empty(0, 2)})
    default = {"a": torch.zeros(5), "b": torch.zeros(5, 2)}
    for index in (torch.tensor([3, 1, 0]), torch.tensor([], dtype=torch.int64)):
        number = len(index)
        warm[index] = {"a": torch.tensor([3.0, 1.0, torch.nan])[:number], "b": torch.ones(number, 2)}
        found = warm.get(torch.arange(5), default)
        assert found["a"].tolist() == [0, 1, 0, 3, 0]
        assert found["b"][:, 0].tolist() == [0, 1, 0, 1, 0]


def test_what_is_not_finite_is_not_stored():
    warm = WarmStart(4, like=(torch.empty(0, 1).half(), torch.empty(0, 1)))
    index = torch.arange(4)
    warm[index] = (torch.ones(4, 1), torch.ones(4, 1))
    # 1e6 overflows in half precision.
    first, second = torch.tensor([[2.0], [torch.nan], [2.0], [1e6]]), torch.tensor([[2.0], [2.0], [torch.inf], [2.0]])
    warm[index] = (first, second)
    default = (torch.zeros(4, 1), torch.zeros(4, 1))
    for leaf in warm.get(index, default):
        assert leaf.flatten().tolist() == [2, 1, 1, 1]
    warm.clear()
    warm[index] = (first, second)
    assert warm.seen.tolist() == [True, False, False, False]


def test_no_gradient_flows_through_it():
    warm = WarmStart(3, like=torch.empty(0, 2))
    z = torch.ones(2, 2, requires_grad=True)
    warm[torch.tensor([0, 1])] = 3 * z
    assert not warm.get(torch.tensor([0, 1]), torch.zeros(2, 2)).requires_grad
    assert not any(buffer.requires_grad for buffer in warm.buffers())
    assert not list(warm.parameters())


def test_state_dict_and_deepcopy():
    warm = WarmStart(4, like={"a": torch.empty(0, 2)})
    warm[torch.tensor([2])] = {"a": torch.ones(1, 2)}
    default = {"a": torch.zeros(4, 2)}
    expected = warm.get(torch.arange(4), default)["a"]
    fresh = WarmStart(4, like={"a": torch.empty(0, 2)})
    fresh.load_state_dict(warm.state_dict())
    for other in (fresh, copy.deepcopy(warm)):
        assert torch.equal(other.get(torch.arange(4), default)["a"], expected)
        other[torch.tensor([0])] = {"a": torch.ones(1, 2)}
        assert warm.seen.tolist() == [False, False, True, False]
    with pytest.raises(RuntimeError, match="size mismatch for seen"):
        WarmStart(5, like={"a": torch.empty(0, 2)}).load_state_dict(warm.state_dict())
    assert warm.double().get(torch.arange(4), default)["a"].dtype == torch.float32


def test_refusals():
    warm, x = WarmStart(5, like=torch.empty(0, 2)), torch.zeros(2, 2)
    for index in ([0, 5], [-1, 0]):
        with pytest.raises(IndexError, match=f"are 0 to 4, got {index[0]} to {index[1]}. Give it num_samples="):
            warm[torch.tensor(index)] = x
    for index in (torch.tensor([0.0, 1.0]), torch.tensor(1), torch.tensor([True, False])):
        with pytest.raises(TypeError, match=r"by their indices, integers of shape \(B,\): got a tensor of"):
            warm.get(index, x)
    with pytest.raises(ValueError, match=r"2 samples of this WarmStart have a state of shape \(2, 2\), got \(3, 2\)"):
        warm[torch.tensor([0, 1])] = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"have a state of shape \(2, 2\), got \(2, 3\)"):
        warm.get(torch.tensor([0, 1]), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="The state must have the structure of the states of this WarmStart"):
        warm[torch.tensor([0, 1])] = [x]
    with pytest.raises(ValueError, match=r"num_samples=...\) must be a positive integer, got 0"):
        WarmStart(0, like=x)
    with pytest.raises(TypeError, match=r"like=...\) must be a tensor or a pytree of tensors"):
        WarmStart(3, like=(2,))
    assert not warm.seen.any()


@pytest.mark.gpu
def test_storage_on_the_cpu_for_a_layer_on_the_gpu():
    layer = FixedPointLayer(TanhMap().cuda(), rtol=1e-5)
    x, index = torch.randn(3, 4, device="cuda"), torch.tensor([4, 0, 2])
    for warm in (WarmStart(5, like=torch.empty(0, 4)), WarmStart(5, like=torch.empty(0, 4)).cuda()):
        for where in (index, index.cuda()):
            z, cold = layer(x, z0=warm.get(where, layer.start(x)), return_solution=True)
            warm[where] = z
            assert warm.get(where, layer.start(x)).device == x.device
            _, solution = layer(x, z0=warm.get(where, layer.start(x)), return_solution=True)
            assert solution.num_evals < max(cold.num_evals, 2)
            warm.clear()

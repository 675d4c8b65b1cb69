import copy

import numpy as np
import pytest
import torch
from torch import nn

from anomalib_dskd.training.weight_average import WeightAverage


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[2].requires_grad_(False)
    return net


def random_steps(net: nn.Sequential, average: WeightAverage, steps: range) -> list[np.ndarray]:
    """Let weights change at random, and return the first layer's after each step."""
    learnt = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for weight in (*net[0].parameters(), *net[1].parameters()):
                weight.copy_(torch.randn(weight.shape, generator=generator))
        average.update()
        learnt.append(net[0].weight.detach().numpy().copy())
    return learnt


def by_hand(learnt: list[np.ndarray], decay: float) -> np.ndarray:
    """What each step's weights count for, written out."""
    decays = [min(decay, n / (n + 9)) for n in range(len(learnt))]
    shares = [(1 - decays[n]) * np.prod(decays[n + 1 :]) for n in range(len(learnt))]
    assert sum(shares) == pytest.approx(1)
    return np.sum([share * weights for share, weights in zip(shares, learnt, strict=True)], axis=0)


@pytest.mark.parametrize("decay", [0.3, 0.8, 0.99])
def test_average_is_that_of_all_steps(decay):
    net = network()
    average = WeightAverage(net, decay=decay)
    learnt = random_steps(net, average, range(100))  # a decay of 0.8 is reached after 36, one of 0.99 never
    np.testing.assert_allclose(average.average["0.weight"], by_hand(learnt, decay), atol=1e-6)
    average.use()
    np.testing.assert_allclose(net[0].weight.detach(), by_hand(learnt, decay), atol=1e-6)


def test_what_is_learnt_comes_back_bit_for_bit_and_nothing_else_moves():
    net = network()
    average = WeightAverage(net, decay=0.9)
    random_steps(net, average, range(1, 6))
    before = copy.deepcopy(net)
    for _ in range(2):  # the second time does nothing
        average.use()
    assert average.is_in_use
    assert not torch.equal(net[0].weight, before[0].weight)
    assert not torch.equal(net[1].bias, before[1].bias)
    assert torch.equal(net[2].weight, before[2].weight)  # frozen
    assert torch.equal(net[1].running_mean, before[1].running_mean)
    averaged = net[0].weight.detach().clone()
    for _ in range(2):
        average.put_back()
    assert not average.is_in_use
    for mine, theirs in zip(net.parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    average.use()
    assert torch.equal(net[0].weight, averaged)


@pytest.mark.parametrize("is_in_use", [False, True])
def test_a_restored_average_goes_on_bit_for_bit(is_in_use):
    net = network()
    average = WeightAverage(net, decay=0.9)
    random_steps(net, average, range(5))
    if is_in_use:
        average.use()
    saved = copy.deepcopy(({**net.state_dict(), **average.average}, average.state_dict()))
    other = network()
    other.load_state_dict(saved[0])
    restored = WeightAverage(other, decay=0.9)
    restored.load_state_dict(saved[1])
    average.use()
    for _ in range(2):
        for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        average.put_back()
        restored.put_back()
    for weights, kept in ((net, average), (other, restored)):
        random_steps(weights, kept, range(5, 8))
        kept.use()
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_another_networks_average_is_refused():
    with pytest.raises(KeyError, match=r"0\.weight"):
        WeightAverage(network(), decay=0.9).load_state_dict(WeightAverage(nn.Linear(1, 1), decay=0.9).state_dict())

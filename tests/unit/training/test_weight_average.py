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
    """Change the weights at random, and return those of the first layer after each step."""
    history = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for weight in (*net[0].parameters(), *net[1].parameters()):
                weight.copy_(torch.randn(weight.shape, generator=generator))
        average.update()
        history.append(net[0].weight.detach().numpy().copy())
    return history


def by_hand(history: list[np.ndarray], decay: float) -> np.ndarray:
    """Weighted sum over all steps, written out."""
    decays = [min(decay, n / (n + 9)) for n in range(len(history))]
    shares = [(1 - decays[n]) * np.prod(decays[n + 1 :]) for n in range(len(history))]
    assert sum(shares) == pytest.approx(1)
    return np.sum([share * weights for share, weights in zip(shares, history, strict=True)], axis=0)


@pytest.mark.parametrize("decay", [0.3, 0.8, 0.99])
def test_average_is_that_of_all_steps(decay):
    net = network()
    average = WeightAverage(net, decay=decay)
    history = random_steps(net, average, range(100))  # a decay of 0.8 is reached after 36 steps, 0.99 never
    np.testing.assert_allclose(average.average["0.weight"], by_hand(history, decay), atol=1e-6)
    average.apply()
    np.testing.assert_allclose(net[0].weight.detach(), by_hand(history, decay), atol=1e-6)


def test_trained_weights_are_restored_bit_for_bit_and_nothing_else_changes():
    net = network()
    average = WeightAverage(net, decay=0.9)
    random_steps(net, average, range(1, 6))
    before = copy.deepcopy(net)
    for _ in range(2):  # the second time does nothing
        average.apply()
    assert average.is_applied
    assert not torch.equal(net[0].weight, before[0].weight)
    assert not torch.equal(net[1].bias, before[1].bias)
    assert torch.equal(net[2].weight, before[2].weight)  # frozen
    assert torch.equal(net[1].running_mean, before[1].running_mean)
    averaged = net[0].weight.detach().clone()
    for _ in range(2):
        average.restore()
    assert not average.is_applied
    for actual, expected in zip(net.parameters(), before.parameters(), strict=True):
        assert torch.equal(actual, expected)
    average.apply()
    assert torch.equal(net[0].weight, averaged)


@pytest.mark.parametrize("is_applied", [False, True])
def test_a_restored_average_continues_bit_for_bit(is_applied):
    net = network()
    average = WeightAverage(net, decay=0.9)
    random_steps(net, average, range(5))
    if is_applied:
        average.apply()
    saved = copy.deepcopy(({**net.state_dict(), **average.average}, average.state_dict()))
    other = network()
    other.load_state_dict(saved[0])
    restored = WeightAverage(other, decay=0.9)
    restored.load_state_dict(saved[1])
    average.apply()
    for _ in range(2):
        for actual, expected in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(actual, expected)
        average.restore()
        restored.restore()
    for model, its_average in ((net, average), (other, restored)):
        random_steps(model, its_average, range(5, 8))
        its_average.apply()
    for actual, expected in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_average_of_another_network_is_refused():
    with pytest.raises(KeyError, match=r"0\.weight"):
        WeightAverage(network(), decay=0.9).load_state_dict(WeightAverage(nn.Linear(1, 1), decay=0.9).state_dict())

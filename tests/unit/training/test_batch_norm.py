import copy

import pytest
import torch
from torch import nn

from anomalib_dskd.training.batch_norm import reestimated_statistics


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    for _ in range(3):
        net(torch.randn(4, 3, 8, 8))
    return net


def test_statistics_are_the_plain_mean_over_the_batches():
    net, batches = network(), [torch.randn(4, 3, 8, 8) for _ in range(3)]
    inputs = {1: [], 4: []}
    for index, seen in inputs.items():
        net[index].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
    with reestimated_statistics(net), torch.no_grad():
        for batch in batches:
            net(batch)
    for index, seen in inputs.items():
        means = torch.stack([batch.transpose(0, 1).flatten(1).mean(1) for batch in seen]).mean(0)
        variances = torch.stack([batch.transpose(0, 1).flatten(1).var(1, unbiased=True) for batch in seen]).mean(0)
        torch.testing.assert_close(net[index].running_mean, means)
        torch.testing.assert_close(net[index].running_var, variances)


def test_momentum_is_restored_and_weights_do_not_change():
    net = network()
    before = copy.deepcopy(net)
    with reestimated_statistics(net), torch.no_grad():
        net(torch.randn(4, 3, 8, 8))
    assert [net[1].momentum, net[4].momentum] == [0.1, 0.1]
    for (name, actual), expected in zip(net.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(actual, expected), name


def test_norms_in_evaluation_mode_do_not_change():
    net = network()
    net[1].eval()
    before, images = copy.deepcopy(net), torch.randn(4, 3, 8, 8)
    with reestimated_statistics(net), torch.no_grad():
        within = net(images)
    assert all(torch.equal(net[1].state_dict()[name], value) for name, value in before[1].state_dict().items())
    assert net[4].num_batches_tracked == 1
    with torch.no_grad():
        assert torch.equal(within, before(images))  # the first norm used its own statistics throughout


def test_without_a_batch_nothing_changes():
    net = network()
    before = copy.deepcopy(net.state_dict())
    with reestimated_statistics(net):
        pass
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_a_norm_that_processes_no_batch_gets_its_statistics_back():
    net = network()
    net.append(nn.BatchNorm2d(2))
    net[5].running_mean.fill_(7)
    with reestimated_statistics(net), torch.no_grad():
        net[:5](torch.randn(4, 3, 8, 8))
    assert net[5].running_mean.tolist() == [7, 7]
    assert net[4].num_batches_tracked == 1


def test_an_error_restores_everything():
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError), reestimated_statistics(net):  # noqa: PT012 - the error must come after a batch
        net(torch.randn(4, 3, 8, 8))
        net(torch.randn(4, 5, 8, 8))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert net[1].momentum == 0.1

"""Adam on channels-last weights."""

import pytest
import torch
from torch import nn, optim
from torch.profiler import ProfilerActivity, profile

from anomalib_dskd.models.distillation.optimization import Adam

ARGUMENTS = {"lr": 0.01, "betas": (0.5, 0.999), "weight_decay": 0.1}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2), nn.Conv2d(2, 5, 1)]
    return nn.Sequential(*layers).double().to(memory_format=torch.channels_last)


def set_gradients(net: nn.Module) -> None:
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    net(images).square().mean().backward()


def copied_tensors(optimizer: optim.Adam) -> int:
    """Take a step, and return how many tensors it copied."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    return sum(event.count for event in profiler.key_averages() if event.key == "aten::clone")


@pytest.mark.parametrize("fused", [True, False])
def test_weights_are_those_of_adam(fused):
    ours, theirs = network(), network()
    optimizers = [Adam(ours.parameters(), fused=fused, **ARGUMENTS), optim.Adam(theirs.parameters(), **ARGUMENTS)]
    for _ in range(3):
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(1)
            set_gradients(net)
            optimizer.step()
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"])


def test_no_gradient_is_copied():
    net = network()
    set_gradients(net)
    assert copied_tensors(Adam(net.parameters(), fused=True, **ARGUMENTS)) == 0


def test_pytorch_still_copies_gradients():
    """Where this fails, the package's ``Adam`` is no longer needed."""
    net = network()
    set_gradients(net)
    assert copied_tensors(optim.Adam(net.parameters(), fused=True, **ARGUMENTS)) > 0


def test_state_in_another_memory_format_is_used_as_it_is():
    ours, theirs = network(), network()
    optimizers = [Adam(ours.parameters(), fused=False, **ARGUMENTS), optim.Adam(theirs.parameters(), **ARGUMENTS)]
    for _ in range(2):
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            torch.manual_seed(1)
            set_gradients(net)
            optimizer.step()
            for state in optimizer.state.values():
                state["exp_avg"] = state["exp_avg"].contiguous()
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)

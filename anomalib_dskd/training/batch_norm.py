"""Batch-norm statistics of the weights as they are, instead of a running average over past weights."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["fresh_statistics"]


@contextmanager
def fresh_statistics(network: nn.Module) -> Iterator[None]:
    """Estimate the statistics of ``network``'s batch norms anew, from the batches that it sees within the context.

    In training a batch norm keeps an exponential average over batches that its and its predecessors' *earlier*
    weights made. Where weights move fast, as with a constant learning rate, the average is not what the present
    weights give, and evaluation suffers. Within the context every batch norm in training mode forgets its
    statistics and takes the plain mean over the batches; one in evaluation mode, such as the frozen teacher's,
    is left alone. (:func:`torch.optim.swa_utils.update_bn` would reset the teacher's too.)

    A batch norm that saw no batch keeps its statistics from before, and so do all if an error ends the context.

    Args:
        network: network whose training-mode batch norms are meant.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(1)
        >>> with fresh_statistics(norm):
        ...     _ = norm(torch.tensor([[1.0], [3.0]])), norm(torch.tensor([[5.0], [7.0]]))
        >>> norm.running_mean.item(), norm.running_var.item()  # means of 2 and 6, and of 2 and 2
        (4.0, 2.0)
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    is_done = False
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # PyTorch's way to ask for the plain mean
        yield
        is_done = True
    finally:
        for norm, buffers, momentum in zip(norms, before, momenta, strict=True):
            norm.momentum = momentum
            if not is_done or norm.num_batches_tracked == 0:
                for name, buffer in norm.named_buffers():
                    buffer.copy_(buffers[name])

"""Batch-norm statistics re-estimated for the present weights, in place of running averages."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["reestimated_statistics"]


@contextmanager
def reestimated_statistics(network: nn.Module) -> Iterator[None]:
    """Re-estimate the batch-norm statistics of ``network`` from the batches that it processes within the context.

    In training, a batch norm keeps an exponential average over batches that *earlier* weights of the network
    produced. If the weights change fast, as with a constant learning rate, this average does not match the present
    weights, and evaluation suffers. Within the context, every batch norm in training mode resets its statistics and
    takes the plain mean over the batches. A batch norm in evaluation mode, such as one of the frozen teacher, does not
    change. (:func:`torch.optim.swa_utils.update_bn` would reset the teacher's statistics too.)

    A batch norm that processes no batch gets its previous statistics back; if the context ends with an error, all do.

    Args:
        network: network whose batch norms in training mode are re-estimated.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(1)
        >>> with reestimated_statistics(norm):
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
            norm.momentum = None  # for PyTorch: the plain mean instead of an exponential average
        yield
        is_done = True
    finally:
        for norm, buffers, momentum in zip(norms, before, momenta, strict=True):
            norm.momentum = momentum
            if not is_done or norm.num_batches_tracked == 0:
                for name, buffer in norm.named_buffers():
                    buffer.copy_(buffers[name])

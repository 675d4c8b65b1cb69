"""Exponential moving average (EMA) of a network's weights, to evaluate with in place of the last step's weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["WeightAverage"]

WARM_UP = 9  # steps until the decay is one half; our choice: as in TensorFlow


class WeightAverage:
    r"""Maintains an average of a network's trainable weights, and swaps it into the network for evaluation.

    After step n, counted from 0, with weights :math:`w_n`,

    .. math:: a_n = d_n a_{n-1} + (1 - d_n) w_n, \qquad d_n = \min\left(d, \frac{n}{n + 9}\right)

    The decay grows, so that a short training run, too, gets an average of its later weights. It is TensorFlow's decay
    one step later, so that the average contains nothing of the weights before the first step. Batch-norm statistics
    are not averaged: re-estimate them for the averaged weights.

    Args:
        network: network whose parameters that require gradients are averaged.
        decay: d.

    Example:
        >>> network = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(network, decay=0.5)
        >>> for weight in (1.0, 3.0):
        ...     _ = nn.init.constant_(network.weight, weight)
        ...     average.update()
        >>> average.apply()
        >>> round(network.weight.item(), 3)  # 0.1 of the first and 0.9 of the second
        2.8
        >>> average.restore()
        >>> network.weight.item()
        3.0
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.is_applied = False
        """Whether the network holds the average and this object the trained weights, or the other way round."""
        self._weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        self._stored = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Add the network's weights to the average, after a step of the optimizer."""
        decay = min(self.decay, self._updates / (self._updates + WARM_UP))
        get_ema_multi_avg_fn(decay)(list(self._stored.values()), list(self._in_network().values()), self._updates)
        self._updates += 1

    def apply(self) -> None:
        """Put the average into the network, unless it is already there."""
        if not self.is_applied:
            self._swap()

    def restore(self) -> None:
        """Put the trained weights back into the network, unless they are already there."""
        if self.is_applied:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            before = weight.detach().clone()
            weight.copy_(self._stored[name])
            self._stored[name].copy_(before)
        self.is_applied = not self.is_applied

    @property
    def average(self) -> dict[str, Tensor]:
        """Averaged weights by name."""
        return self._in_network() if self.is_applied else dict(self._stored)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs in addition to a network that holds the average."""
        return {"updates": self._updates, "learnt": dict(self._stored) if self.is_applied else self._in_network()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the network must hold the average of that time.

        Raises:
            KeyError: the state is that of another network.
        """
        trained: dict[str, Tensor] = state["learnt"]
        for name, weight in self._stored.items():
            weight.copy_(trained[name])
        self._updates, self.is_applied = state["updates"], True

    def _in_network(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self._weights.items()}

"""An exponential average of weights over the steps of a training, to score with instead of the last step's."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["WeightAverage"]

WARM_UP = 9  # our choice, TensorFlow's: steps until the decay is a half


class WeightAverage:
    r"""Holds an average of a network's trained weights, and puts it in their place while images are scored.

    After the n-th step, counted from 0, with weights :math:`w_n`,

    .. math:: a_n = d_n a_{n-1} + (1 - d_n) w_n, \qquad d_n = \min\left(d, \frac{n}{n + 9}\right)

    The decay grows so that a short training, too, has an average of its later weights; it is TensorFlow's one step
    later, so that nothing of the weights before the first step remains. Batch-norm statistics are not averaged: they
    are to be estimated anew for the averaged weights.

    Args:
        network: its parameters that take gradients are meant.
        decay: d.

    Example:
        >>> network = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(network, decay=0.5)
        >>> for weight in (1.0, 3.0):
        ...     _ = nn.init.constant_(network.weight, weight)
        ...     average.update()
        >>> average.use()
        >>> round(network.weight.item(), 3)  # 0.1 of the first and 0.9 of the second
        2.8
        >>> average.put_back()
        >>> network.weight.item()
        3.0
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.is_in_use = False
        """Whether the average is in the network, and what is learnt held here; else the other way round."""
        self._weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        self._held = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's weights into the average, after a step of the optimiser."""
        decay = min(self.decay, self._updates / (self._updates + WARM_UP))
        get_ema_multi_avg_fn(decay)(list(self._held.values()), list(self._in_network().values()), self._updates)
        self._updates += 1

    def use(self) -> None:
        """Put the average in the network's place, unless it is there already."""
        if not self.is_in_use:
            self._swap()

    def put_back(self) -> None:
        """Put what is learnt back into the network, unless it is there already."""
        if self.is_in_use:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            before = weight.detach().clone()
            weight.copy_(self._held[name])
            self._held[name].copy_(before)
        self.is_in_use = not self.is_in_use

    @property
    def average(self) -> dict[str, Tensor]:
        """Averaged weights by name."""
        return self._in_network() if self.is_in_use else dict(self._held)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside a network that holds the average."""
        return {"updates": self._updates, "learnt": dict(self._held) if self.is_in_use else self._in_network()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the network holds the average of that moment.

        Raises:
            KeyError: the state is another network's.
        """
        learnt: dict[str, Tensor] = state["learnt"]
        for name, weight in self._held.items():
            weight.copy_(learnt[name])
        self._updates, self.is_in_use = state["updates"], True

    def _in_network(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self._weights.items()}

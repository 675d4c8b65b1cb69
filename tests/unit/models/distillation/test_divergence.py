from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch

from anomalib_dskd.errors import DivergedError
from anomalib_dskd.models.distillation.divergence import check_loss, check_weights

BATCH = ImageBatch(image=torch.rand(1, 3, 8, 8), image_path=["good/7.png"])


def trainer(*, others_are_finite: bool):
    """As one of two processes sees it."""
    strategy = SimpleNamespace(reduce_boolean_decision=lambda own: own and others_are_finite)
    return SimpleNamespace(strategy=strategy, current_epoch=3)


@pytest.mark.parametrize(
    ("loss", "others_are_finite", "message"),
    [
        (float("nan"), True, "the loss is nan in batch 5 of epoch 3. The batch's images: good/7.png. Training has"),
        (float("-inf"), False, "the loss is -inf in batch 5 of epoch 3"),
        (0.5, False, "the loss is not finite in another process's part of batch 5 of epoch 3"),
    ],
)
def test_a_loss_that_is_not_finite_in_one_process_stops_all(loss, others_are_finite, message):
    with pytest.raises(DivergedError, match=message):
        check_loss(trainer(others_are_finite=others_are_finite), torch.tensor(loss), BATCH, 5)


def test_a_finite_loss_stops_nothing():
    check_loss(trainer(others_are_finite=True), torch.tensor(0.5), BATCH, 5)
    check_loss(None, torch.tensor(0.5), BATCH, 5)


def network() -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({"teacher": torch.nn.Linear(1, 1), "student": torch.nn.BatchNorm1d(2)})


@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_weights_that_are_not_finite_are_named(name):
    model = network()
    getattr(model["student"], name).data[1] = torch.inf
    with pytest.raises(DivergedError, match=rf"not finite in epoch 4: 1 tensors, the first 'student.{name}'. Training"):
        check_weights(model, epoch=4)


def test_only_what_is_learnt_must_be_finite():
    model = network()
    model["teacher"].weight.data.fill_(torch.nan)
    check_weights(model, epoch=0)

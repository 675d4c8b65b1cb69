import pytest
import torch
from anomalib.data import ImageBatch

from anomalib_dskd import Afkd
from tests.conftest import TEACHER


def test_loss_is_one_minus_the_cosine_of_teacher_and_decoder(teacher_weights):
    model = Afkd(teacher=TEACHER, teacher_weights=teacher_weights, image_size=64, sigma=2.0, seed=0)
    model.load_teacher_weights()
    batch = ImageBatch(image=torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    losses = model.train().compute_losses(batch)
    teacher_features, students = model.model(batch.image)
    levels = [
        (1 - torch.nn.functional.cosine_similarity(teacher, student, dim=1)).mean().item()
        for teacher, student in zip(teacher_features, students["decoder"], strict=True)
    ]
    assert list(losses) == ["decoder"]
    assert losses["decoder"].item() == pytest.approx(sum(levels) / 3, abs=1e-5)
    assert losses["decoder"].requires_grad

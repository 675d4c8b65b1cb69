import pytest
import torch
from anomalib.data import ImageBatch
from lightning import Trainer

from anomalib_dskd import Dtgd
from anomalib_dskd.training.feature_cache import FeatureCache
from tests.conftest import RESNET


@pytest.fixture
def model(resnet_weights) -> Dtgd:
    model = Dtgd(
        teacher=RESNET, teacher_weights=resnet_weights, image_size=64, sigma=2.0, seed=0, defect_probability=1.0
    )
    model.load_teacher_weights()
    return model.train()


@pytest.fixture
def batch() -> ImageBatch:
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return ImageBatch(image=2 * pixels - 1, image_path=[f"good/{index}.png" for index in range(3)])


def watch(model: Dtgd) -> list[torch.Tensor]:
    """Let the teacher note what it sees."""
    seen = []
    model.model.teacher.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    return seen


def test_losses_are_those_of_the_damaged_image_against_the_clean_ones_features(model, batch):
    losses = model.compute_losses(batch)
    damaged, masks = model.pseudo_defects(batch.image, batch.image_path, epoch=0)
    anomaly_teacher = model.model.teacher(damaged)
    students = model.model.student_features(damaged, anomaly_teacher)
    expected = model.loss(model.model.teacher(batch.image), students, anomaly_teacher, masks)
    assert list(losses) == ["encoder", "decoder", "dissimilarity"]
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), abs=1e-6)
        assert loss > 0


def test_each_epoch_has_other_damage(model, batch):
    model.trainer = Trainer(max_epochs=9, accelerator="cpu", logger=False, enable_checkpointing=False)
    seen = watch(model)
    for epoch in (0, 3, 3):
        model.trainer.fit_loop.epoch_progress.current.completed = epoch
        model.compute_losses(batch)
    damaged = [images for images in seen if not torch.equal(images, batch.image)]
    expected = [model.pseudo_defects(batch.image, batch.image_path, epoch=epoch)[0] for epoch in (0, 3, 3)]
    assert [torch.equal(mine, theirs) for mine, theirs in zip(damaged, expected, strict=True)] == [True] * 3
    assert not torch.equal(damaged[0], damaged[1])


def test_cache_holds_clean_images_alone(model, batch):
    seen = watch(model)
    model.model.teacher_cache = FeatureCache(model.model.teacher, images=3, memory=1.0)
    first = model.compute_losses(batch)
    damaged = model.pseudo_defects(batch.image, batch.image_path, epoch=0)[0]
    assert torch.equal(torch.cat([image for image in seen if len(image) == 1]), batch.image)  # one by one for the cache
    assert [torch.equal(images, damaged) for images in seen if len(images) > 1] == [True]
    seen.clear()
    again = model.compute_losses(batch)
    assert len(model.model.teacher_cache) == 3
    assert [torch.equal(image, damaged) for image in seen] == [True]  # computed anew; the clean one is not
    for name, loss in first.items():
        assert again[name].item() == pytest.approx(loss.item(), abs=1e-5)


def test_batch_norm_sees_damaged_images_and_no_clean_ones(model, batch):
    seen = watch(model)
    inputs = []
    model.model.encoder_student.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    model.run_students(batch)
    damaged = model.pseudo_defects(batch.image, batch.image_path, epoch=0)[0]
    assert [torch.equal(image, damaged) for image in (*seen, *inputs)] == [True, True]


def test_damage_is_drawn_on_the_pixels_before_normalization(model, batch):
    assert model.pseudo_defects.mean.flatten().tolist() == [0.5] * 3
    assert model.pseudo_defects.std.flatten().tolist() == [0.5] * 3
    damaged, _ = model.pseudo_defects(batch.image, batch.image_path, epoch=0)
    assert damaged.min() >= -1
    assert damaged.max() <= 1


def test_nothing_is_damaged_outside_training(model, batch, monkeypatch):
    model.model.is_trained = True
    monkeypatch.setattr(model, "pseudo_defects", None)
    with torch.no_grad():
        predicted = model.eval().predict_step(batch, 0)
    assert predicted.anomaly_map.shape == (3, 64, 64)

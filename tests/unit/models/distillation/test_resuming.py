import torch

from anomalib_dskd import Afkd, Dskd, Tad
from anomalib_dskd.models.distillation.checkpoint_io import AtomicCheckpointIO
from anomalib_dskd.models.distillation.resuming import (
    canonical_value,
    constructor_defaults,
    without_unknown_arguments,
)
from tests.conftest import TEACHER


def test_defaults_are_those_of_own_and_shared_arguments():
    defaults = constructor_defaults(Afkd)
    assert (defaults["fusion"], defaults["embedding_blocks"]) == ("learned", 2)  # its own
    assert (defaults["teacher"], defaults["sigma"], defaults["visualizer"]) == ("resnet18.tv_in1k", 4.0, True)
    assert not {"self", "kwargs", "args"} & set(defaults)


def test_defaults_of_a_subclass_win():
    class Own(Dskd):
        def __init__(self, l2_weight: float = 0.2, extra: int = 1, **kwargs) -> None:
            super().__init__(l2_weight=l2_weight, **kwargs)
            self.extra = extra

    defaults = constructor_defaults(Own)
    assert (defaults["l2_weight"], defaults["extra"], defaults["sigma"]) == (0.2, 1, 4.0)


def test_spellings_of_the_same_value_are_equal():
    arguments = {"teacher": "resnet18", "layers": (1, 2), "assistant_layers": None, "image_size": 64, "sigma": 2.0}
    assert canonical_value(Tad, "teacher", arguments) == "resnet18.a1_in1k"
    assert canonical_value(Tad, "assistant_layers", arguments) == [1, 2]
    assert canonical_value(Tad, "image_size", arguments) == (64, 64)
    assert canonical_value(Tad, "sigma", arguments) == 2.0


def test_a_checkpoint_with_an_argument_that_the_model_does_not_have_is_loaded(tmp_path, tiny_model):
    path = tmp_path / "model.ckpt"
    checkpoint = {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": tiny_model.state_dict(),
        "hyper_parameters": {"teacher": TEACHER, "image_size": 64, "sigma": 2.0, "of_another_version": 1},
    }
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    loaded = Dskd.load_from_checkpoint(path)
    assert loaded.hparams["sigma"] == 2.0
    assert "of_another_version" not in loaded.hparams
    weight = "decoder_student.stages.0.0.main.1.weight"
    assert torch.equal(loaded.model.get_parameter(weight), tiny_model.model.get_parameter(weight))


def test_a_checkpoint_with_known_arguments_is_not_copied(tmp_path):
    path = tmp_path / "model.ckpt"
    AtomicCheckpointIO().save_checkpoint({"hyper_parameters": {"sigma": 2.0}}, path)
    assert without_unknown_arguments(Dskd, path) == path

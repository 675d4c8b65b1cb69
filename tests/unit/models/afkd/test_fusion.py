import pytest
import torch
from torch import Tensor, nn

from anomalib_dskd.components.backbone import FeatureLevel
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.afkd.fusion import AsymptoticFusion, FusedLevel, mix

LEVELS = [FeatureLevel(4, 4, False), FeatureLevel(6, 8, False), FeatureLevel(8, 16, False)]


def pyramid(size: int = 16, batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, level.channels, 4 * size // level.stride, 4 * size // level.stride, generator=generator)
        for level in LEVELS
    ]


def randomised(module: nn.Module) -> nn.Module:
    """Give the scores, which start from zeros, random weights."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, FusedLevel) and part.scores is not None:
            nn.init.normal_(part.scores.weight)
            nn.init.normal_(part.scores.bias)
    return module.eval()


def transparent(level: FusedLevel) -> FusedLevel:
    """Let every convolution of a one-channel meeting pass its middle pixel on, without batch norm."""
    for part in level.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 1e-30  # lost in rounding; older versions of PyTorch refuse 0
        elif isinstance(part, nn.Conv2d) and part is not level.scores:
            nn.init.zeros_(part.weight)
            part.weight.data[0, 0, part.weight.shape[-2] // 2, part.weight.shape[-1] // 2] = 1.0
    return level.eval()


def test_mix_by_hand():
    sources = [torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[10.0, 20.0]]]])]
    weights = torch.tensor([[[[0.25, 1.0]], [[0.75, 0.0]]]])  # (1, 2, 1, 2)
    assert mix(sources, weights).tolist() == [[[[7.75, 2.0]]]]


def test_meeting_of_two_levels_by_hand():
    levels = [FeatureLevel(1, 4, False), FeatureLevel(1, 8, False)]
    shallow, deep = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([[[[8.0]]]])
    first = transparent(FusedLevel(levels, 0, weights="equal"))
    second = transparent(FusedLevel(levels, 1, weights="equal"))
    assert first([shallow, deep]).tolist() == [[[[4.5, 5.0], [5.5, 6.0]]]]  # with 8 at each pixel
    assert second([shallow, deep]).tolist() == [[[[4.5]]]]  # with 1, under the middle of the stride-2 kernel


@pytest.mark.parametrize("source", [0, 1])
def test_the_level_itself_and_deeper_ones_pass_a_convolution(source):
    level = transparent(FusedLevel([FeatureLevel(1, 4, False), FeatureLevel(1, 4, False)], 0, weights="equal"))
    level.paths[source][0].weight.data *= 3
    made = [part.item() for part in level.sources([torch.full((1, 1, 1, 1), 2.0)] * 2)]
    assert made == ([6.0, 2.0] if source == 0 else [2.0, 6.0])


def test_deeper_levels_are_resized_bilinearly():
    levels = [FeatureLevel(1, 4, False), FeatureLevel(1, 8, False)]
    level = transparent(FusedLevel(levels, 0, weights="equal"))
    _, deep = level.sources([torch.zeros(1, 1, 1, 4), torch.tensor([[[[0.0, 4.0]]]])])
    assert deep.tolist() == [[[[0.0, 1.0, 3.0, 4.0]]]]


def test_learnt_weights_are_a_softmax_of_linear_scores():
    levels = [FeatureLevel(1, 4, False), FeatureLevel(1, 4, False)]
    level = transparent(FusedLevel(levels, 1, weights="learned"))
    level.scores.weight.data = torch.tensor([[[[1.0]], [[0.0]]], [[[0.0]], [[2.0]]]])  # scores: x and 2 y
    level.scores.bias.data = torch.tensor([0.0, 1.0])
    weights = level.weights([torch.tensor([[[[3.0]]]]), torch.tensor([[[[0.5]]]])])
    expected = torch.tensor([3.0, 2.0]).softmax(0)
    torch.testing.assert_close(weights.flatten(), expected)


@pytest.mark.parametrize("weights", ["learned", "equal"])
def test_weights_sum_to_one_at_each_pixel(weights):
    fusion = randomised(AsymptoticFusion(LEVELS, weights))
    features = pyramid()
    for meeting in fusion.meetings:
        for level in meeting:
            sources = level.sources(features[: len(meeting)])
            made = level.weights(sources)
            torch.testing.assert_close(made.sum(dim=1), torch.ones_like(made[:, 0]))
            assert (made > 0).all()
            if weights == "learned":
                assert made.shape == (2, len(meeting), *features[level.target].shape[-2:])
                assert made.std(dim=(0, 2, 3)).min() > 0.01  # of its own at each pixel


def test_learnt_weights_start_equal():
    learned, equal = AsymptoticFusion(LEVELS, "learned").eval(), AsymptoticFusion(LEVELS, "equal").eval()
    missing, unexpected = equal.load_state_dict(learned.state_dict(), strict=False)
    assert not missing
    assert all(".scores." in name for name in unexpected)
    for mine, theirs in zip(learned(pyramid()), equal(pyramid()), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_source_of_no_weight_has_no_influence(target, silent):
    torch.manual_seed(0)
    level = FusedLevel(LEVELS, target, weights="learned").eval()
    level.scores.bias.data[silent] = -1e4
    features = pyramid()
    expected = level(features)
    for index, changed in enumerate(pyramid(seed=1)):
        result = level([changed if position == index else old for position, old in enumerate(features)])
        assert torch.equal(result, expected) == (index == silent)


def test_the_deepest_level_joins_last():
    fusion = randomised(AsymptoticFusion(LEVELS))
    assert [[len(level.paths) for level in meeting] for meeting in fusion.meetings] == [[2, 2], [3, 3, 3]]
    seen = []
    for meeting in fusion.meetings:
        meeting[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    features = pyramid()
    fusion(features)
    first, second = seen
    assert [torch.equal(a, b) for a, b in zip(first, features[:2], strict=True)] == [True, True]
    assert [torch.equal(a, b) for a, b in zip(second, features, strict=True)] == [False, False, True]


def test_shapes_stay_and_odd_sizes_are_met():
    fusion = AsymptoticFusion(LEVELS).eval()
    for sizes in ([(17, 21), (9, 11), (5, 6)], [(17, 23), (8, 11), (4, 5)]):  # rounded up, and down
        features = [torch.randn(1, level.channels, *size) for level, size in zip(LEVELS, sizes, strict=True)]
        assert [level.shape for level in fusion(features)] == [level.shape for level in features]


def test_one_level_is_passed_on():
    (level,) = AsymptoticFusion(LEVELS[:1])([features := pyramid()[0]])
    assert level is features


def test_equal_fusion_learns_no_weights():
    learned, equal = AsymptoticFusion(LEVELS, "learned"), AsymptoticFusion(LEVELS, "equal")
    extra = {name for name, _ in learned.named_parameters()} - {name for name, _ in equal.named_parameters()}
    assert len(extra) == 2 * (2 + 3)  # weight and bias of each level of each meeting
    sum(level.square().mean() for level in learned.train()(pyramid())).backward()
    assert all(learned.get_parameter(name).grad.abs().sum() > 0 for name in extra)


def test_unknown_weights_are_refused():
    with pytest.raises(ArgumentError, match="fusion 'max' is not supported. Supported values: 'learned', 'equal'"):
        AsymptoticFusion(LEVELS, "max")

"""Augmentation: consistent in time and across views, and from the generator alone."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from cascade_engine.errors import InvalidInput
from cascade_engine.video.augment import Augment, Draws, centre, repeat_frames, shuffle_frames
from cascade_engine.video.views import VIEWS, flip, to_float

STILL = {"area": (1.0, 1.0), "ratio": (1.0, 1.0), "jitter": 0.0, "grayscale": 0.0}


@pytest.fixture
def clips():
    rng = np.random.default_rng(0)
    made = {}
    for name, view in VIEWS.items():
        shape = (4, 6, 24, 24, view.channels)
        made[name] = (
            rng.integers(-127, 128, shape).astype(np.int8) if view.signed else rng.integers(0, 256, shape, np.uint8)
        )
    return made


def same_for_all_frames(clips):
    """Clips whose frames are all alike."""
    return {name: np.repeat(array[:, :1], array.shape[1], axis=1) for name, array in clips.items()}


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_the_same_seed_gives_the_same_bits(clips, kind):
    make = (lambda seed: torch.Generator().manual_seed(seed)) if kind == "torch" else np.random.default_rng
    augment = Augment(size=16, blur=0.5)
    first, again, other = augment(clips, make(1)), augment(clips, make(1)), augment(clips, make(2))
    for name, view in VIEWS.items():
        assert first[name].shape == (4, view.channels, 6, 16, 16)
        assert first[name].dtype == torch.float32
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert first[name].abs().max() <= 1


def test_nothing_drawn_is_the_centre(clips):
    made = Augment(size=24, flip=0.0, **STILL)(clips, torch.Generator().manual_seed(0))
    for name in VIEWS:
        expected = centre(name, clips[name], 24)
        torch.testing.assert_close(made[name], expected, atol=1e-5, rtol=0)
        stored = torch.from_numpy(clips[name]).permute(0, 4, 1, 2, 3)
        torch.testing.assert_close(expected, to_float(name, stored), atol=0, rtol=0)


def test_what_a_clip_becomes_does_not_depend_on_its_companions(clips):
    """Large pictures are halved before they are sampled; whether they are must not follow from the batch's crops."""
    augment = Augment(size=8, area=(0.3, 1.0))
    draws = augment.draw(4, np.random.default_rng(0))
    for name, stored in clips.items():
        joint = augment.apply(name, stored, draws)
        for n in range(4):
            alone = Draws(**{each.name: getattr(draws, each.name)[n : n + 1] for each in fields(draws)})
            torch.testing.assert_close(augment.apply(name, stored[n : n + 1], alone)[0], joint[n], atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", [96, 97])
@pytest.mark.parametrize("across", [(0, 1), (0,), (1,)])
def test_a_fine_pattern_is_averaged_not_sampled_here_and_there(side, across):
    """A chessboard, and stripes either way."""
    board = (np.indices((side, side))[list(across)].sum(0) % 2 * 254 - 127).astype(np.int8)
    stored = np.broadcast_to(board[..., None], (3, 2, side, side, 2))
    made = Augment(size=32)({"flow": stored}, torch.Generator().manual_seed(0))["flow"]
    assert made.abs().max() < 0.05


def test_a_flip_mirrors_and_negates_horizontal_motion(clips):
    made = Augment(size=24, flip=1.0, **STILL)(clips, torch.Generator().manual_seed(0))
    for name in VIEWS:
        torch.testing.assert_close(made[name], centre(name, flip(name, clips[name]), 24), atol=1e-5, rtol=0)


def test_all_frames_of_a_clip_are_varied_alike_and_clips_differently(clips):
    made = Augment(size=16, blur=0.5)(same_for_all_frames(clips), torch.Generator().manual_seed(3))
    for name in VIEWS:
        torch.testing.assert_close(made[name], made[name][:, :, :1].expand_as(made[name]), atol=0, rtol=0)
    clips["rgb"][:] = clips["rgb"][:1]
    varied = Augment(size=16)(clips, torch.Generator().manual_seed(3))["rgb"]
    assert not torch.equal(varied[0], varied[1])


def test_all_views_get_the_same_crop_and_motion_grows_with_it():
    ramp = np.broadcast_to(np.linspace(0, 254, 64).astype(np.uint8)[:, None, None], (64, 64, 3))
    across = np.zeros((64, 64, 2), np.int8)
    across[..., 0], across[..., 1] = 20, -10
    clips = {"rgb": np.tile(ramp, (8, 2, 1, 1, 1)), "flow": np.tile(across, (8, 2, 1, 1, 1))}
    augment = Augment(size=32, area=(0.25, 0.25), ratio=(1.0, 1.0), flip=0.5, jitter=0.0, grayscale=0.0)
    generator = torch.Generator().manual_seed(5)
    draws = augment.draw(8, generator)
    flow, rgb = augment.apply("flow", clips["flow"], draws), augment.apply("rgb", clips["rgb"], draws)
    signs = torch.where(draws.flip, -1.0, 1.0)
    torch.testing.assert_close(flow[:, 0, 0, 5, 5], signs * 2 * 20 / 127)
    torch.testing.assert_close(flow[:, 1, 0, 5, 5], torch.full((8,), -2 * 10 / 127))
    # A half-size crop of a vertical ramp spans half of its range, around the crop's own centre.
    spans = rgb[:, 0, 0, -1, 0] - rgb[:, 0, 0, 0, 0]
    torch.testing.assert_close(spans, torch.full((8,), 31 / 63 * 254 / 127.5), atol=0.05, rtol=0)
    torch.testing.assert_close(rgb[:, 0, 0, 15:17, 0].mean(1), draws.centre[:, 1], atol=0.05, rtol=0)


def test_tempo_and_drift_change_displacements_alone(clips):
    stored = {name: array // 4 for name, array in clips.items()}  # far from the clamp
    made = Augment(size=24, flip=0.0, tempo=0.5, drift=0.25, **STILL)(stored, torch.Generator().manual_seed(0))
    for name, view in VIEWS.items():
        plain = centre(name, stored[name], 24)
        if not view.displaces:
            torch.testing.assert_close(made[name], plain, atol=1e-5, rtol=0)
            continue
        for clip, was in zip(made[name], plain, strict=True):
            low = was.flatten(1).min(1)
            high = was.flatten(1).max(1)
            factor = (clip.flatten(1).amax(1) - clip.flatten(1).amin(1)) / (high.values - low.values)
            assert 1 / 1.5 <= factor[0] <= 1.5
            torch.testing.assert_close(factor[0], factor[1], atol=1e-4, rtol=0)
            added = (clip - factor[0] * was).flatten(1)
            assert added.std(1).max() < 1e-4  # the same for all pixels and frames
            assert 0 < added.mean(1).abs().max() <= 0.25


def test_grayscale_leaves_no_colour(clips):
    made = Augment(size=16, grayscale=1.0, jitter=0.0)(clips, torch.Generator().manual_seed(0))["rgb"]
    torch.testing.assert_close(made, made[:, :1].expand_as(made), atol=2e-3, rtol=0)


def test_blur_smooths(clips):
    options = {"size": 24, "flip": 0.0, "sigma": (1.5, 1.5), **STILL}
    sharp = Augment(blur=0.0, **options)(clips, torch.Generator().manual_seed(0))["rgb"]
    soft = Augment(blur=1.0, **options)(clips, torch.Generator().manual_seed(0))["rgb"]
    assert soft.diff(dim=-1).abs().mean() < 0.4 * sharp.diff(dim=-1).abs().mean()
    torch.testing.assert_close(soft.mean(), sharp.mean(), atol=0.01, rtol=0)


def test_large_frames_are_averaged_not_skipped_over():
    checks = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    clips = np.tile(checks[None, None, :, :, None], (2, 2, 1, 1, 3))
    made = Augment(size=16, flip=0.0, **STILL)({"rgb": clips}, torch.Generator().manual_seed(0))["rgb"]
    assert made.abs().max() < 0.02
    assert centre("rgb", clips, 16).abs().max() < 0.02


def test_repeated_frames_stand_still(clips):
    rgb = centre("rgb", clips["rgb"], 24)
    still = repeat_frames("rgb", rgb, torch.Generator().manual_seed(0))
    assert torch.equal(still, still[:, :, :1].expand_as(still))
    for before, after in zip(rgb, still, strict=True):
        assert any(torch.equal(after[:, 0], before[:, t]) for t in range(6))
    flow = centre("flow", clips["flow"], 24)
    assert not repeat_frames("flow", flow, torch.Generator().manual_seed(0)).any()


def test_shuffled_frames_are_the_same_frames_in_another_order():
    clips = torch.arange(2.0).view(1, 1, 2, 1, 1).repeat(64, 3, 1, 4, 4)
    shuffled = shuffle_frames(clips, torch.Generator().manual_seed(0))
    assert torch.equal(shuffled, clips.flip(2)), "two frames have one other order only"
    longer = torch.rand(5, 3, 7, 4, 4, generator=torch.Generator().manual_seed(1))
    shuffled = shuffle_frames(longer, np.random.default_rng(0))
    assert not torch.equal(shuffled, longer)
    assert torch.equal(shuffled.sum((1, 3, 4)).sort(1).values, longer.sum((1, 3, 4)).sort(1).values)
    with pytest.raises(InvalidInput, match="at least 2 frames"):
        shuffle_frames(clips[:, :, :1], torch.Generator())


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_batch_of_no_clips_is_none_afterwards(clips, kind):
    make = (lambda: torch.Generator().manual_seed(0)) if kind == "torch" else lambda: np.random.default_rng(0)
    made = Augment(size=8, blur=1.0)({name: array[:0] for name, array in clips.items()}, make())
    for name, view in VIEWS.items():
        assert made[name].shape == centre(name, clips[name][:0], 8).shape == (0, view.channels, 6, 8, 8)
        assert repeat_frames(name, made[name], make()).shape == made[name].shape
        assert shuffle_frames(made[name], make()).shape == made[name].shape
        # None of four draw for all four: the generator goes on as for those that have some.
        some, none = make(), make()
        shuffle_frames(torch.zeros(2, 3, 6, 8, 8), some, first=2, joint=4)
        assert shuffle_frames(made[name], none, first=4, joint=4).shape == made[name].shape
        draw = (lambda generator: torch.rand(1, generator=generator)) if kind == "torch" else lambda it: it.random()
        assert draw(some) == draw(none)


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"flip": 1.5}, {"area": (0.8, 0.5)}, {"area": (0.0, 1.0)}, {"hue": -1.0}]
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(InvalidInput, match="augment: expected"):
        Augment(**{"size": 8, **wrong})


def test_misshapen_clips_are_refused(clips):
    augment = Augment(size=8)
    with pytest.raises(InvalidInput, match=r'clips\["flow"\]: expected \(4, T, H, W, 2\)'):
        augment({"rgb": clips["rgb"], "flow": clips["rgb"]}, torch.Generator())
    with pytest.raises(InvalidInput, match="expected names among"):
        centre("sound", clips["rgb"], 8)

"""The encoders: shapes, strict weights, batch norm that does not leak, the momentum copy."""

import pytest
import torch

from cascade_engine.errors import CheckpointError, InvalidInput
from cascade_engine.models import ENCODERS, MomentumEncoder, build_encoder, load_weights
from cascade_engine.models.norm import GroupedBatchNorm3d


@pytest.mark.parametrize("name", sorted(ENCODERS))
@pytest.mark.parametrize(("channels", "shape"), [(3, (8, 48, 48)), (2, (1, 33, 17))])
def test_encoders_take_any_clip_and_give_unit_vectors(name, channels, shape):
    encoder = build_encoder(name, channels, dim=24).eval()
    clips = torch.randn(2, channels, *shape)
    with torch.no_grad():
        features = encoder.backbone(clips)
        embedded = encoder(clips)
    assert features.shape == (2, encoder.feature_dim)
    assert embedded.shape == (2, encoder.embedding_dim) == (2, 24)
    assert torch.allclose(embedded.norm(dim=1), torch.ones(2), atol=1e-6)


def test_unknown_encoder_and_bad_numbers_are_refused():
    with pytest.raises(InvalidInput, match="encoder: expected one of r3d_small"):
        build_encoder("s4d", 3)
    with pytest.raises(InvalidInput, match="at least 1"):
        build_encoder("r3d_small", 0)
    with pytest.raises(InvalidInput, match="norm: expected one of batch, group, got 'grp'"):
        build_encoder("r3d_small", 3, norm="grp")


def test_one_generator_one_encoder():
    torch.manual_seed(3)
    first = build_encoder("r3d_small", 3).state_dict()
    torch.manual_seed(3)
    again = build_encoder("r3d_small", 3, norm_groups=4).state_dict()
    assert list(first) == list(again)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_weights_are_loaded_strictly():
    encoder, other = build_encoder("r3d_small", 3), build_encoder("r3d_small", 2)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = dict(other.state_dict())
    del state["head.2.bias"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        load_weights(encoder, state, "file.pt")
    message = str(caught.value)
    assert "file.pt" in message
    assert "missing: head.2.bias" in message
    assert "extra: extra" in message
    assert "misshapen: backbone.0.0.weight (16, 2, 3, 5, 5) instead of (16, 3, 3, 5, 5)" in message
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_batch_norm_statistics_are_taken_per_group():
    norm = GroupedBatchNorm3d(3)
    norm.groups = 3
    batch = torch.randn(7, 3, 2, 4, 4)  # parts of 3, 2 and 2
    out = norm(batch)
    parts = [torch.nn.BatchNorm3d(3)(part) for part in torch.tensor_split(batch, 3)]
    assert torch.allclose(out, torch.cat(parts), atol=1e-6)
    means = torch.stack([part.mean((0, 2, 3, 4)) for part in torch.tensor_split(batch, 3)]).mean(0)
    assert torch.allclose(norm.running_mean, 0.1 * means, atol=1e-6)
    assert norm.num_batches_tracked == 1
    norm.eval()
    plain = torch.nn.BatchNorm3d(3).eval()
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm(batch), plain(batch))


def test_a_group_does_not_see_the_clips_of_another():
    """The leak itself: with plain batch norm a clip's output depends on every other clip of the batch."""
    clips = torch.randn(4, 3, 4, 16, 16)
    changed = clips.clone()
    changed[2:] += 1.0
    torch.manual_seed(0)
    grouped = build_encoder("r3d_small", 3, norm_groups=2).train()
    assert torch.equal(grouped(clips)[:2], grouped(changed)[:2])
    torch.manual_seed(0)
    plain = build_encoder("r3d_small", 3).train()
    assert not torch.equal(plain(clips)[:2], plain(changed)[:2])


@pytest.mark.parametrize("name", ["r3d_small", "r3d18", "s3d"])
def test_group_norm_sees_one_clip_and_computes_alike_in_training_and_evaluation(name):
    clips = torch.randn(2, 3, 8, 32, 32)
    encoder = build_encoder(name, 3, norm="group").train()
    if name == "s3d":  # no dropout in its features, but a check that none is left
        assert not any(isinstance(each, torch.nn.BatchNorm3d) for each in encoder.modules())
    with torch.no_grad():
        both, alone = encoder(clips), encoder(clips[:1])
        assert torch.allclose(both[:1], alone, atol=1e-5)
        assert torch.equal(both, encoder.eval()(clips))


def test_momentum_encoder_follows_slowly_and_has_no_gradients():
    encoder = build_encoder("r3d_small", 2)
    keys = MomentumEncoder(encoder, 0.9)
    start = [each.clone() for each in keys.encoder.parameters()]
    with torch.no_grad():
        for each in encoder.parameters():
            each.add_(1.0)
    keys.follow(encoder)
    for before, after in zip(start, keys.encoder.parameters(), strict=True):
        assert torch.allclose(after, before + 0.1, atol=1e-6)
    assert not keys(torch.randn(2, 2, 4, 16, 16)).requires_grad
    assert not any(each.requires_grad for each in keys.parameters())


def test_r3d_features_are_torchvisions():
    from torchvision.models.video import r3d_18

    torch.manual_seed(1)
    encoder = build_encoder("r3d18", 3).eval()
    torch.manual_seed(1)
    net = r3d_18(weights=None).eval()
    net.fc = torch.nn.Identity()
    clips = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder.backbone(clips), net(clips))


def test_a_clip_alone_is_normalised_even_where_nothing_is_left_to_average():
    """A net that ends at 1 x 1 x 1 and a last batch of one clip: torch's own batch norm raises there."""
    for groups in (1, 4):
        encoder = build_encoder("r3d_small", 2, norm_groups=groups).train()
        encoder(torch.randn(8, 2, 4, 32, 32))
        last = [each for each in encoder.modules() if isinstance(each, torch.nn.BatchNorm3d)][-1]
        before = last.running_var.clone()
        found = encoder(torch.randn(1, 2, 4, 16, 16))
        found.sum().backward()
        assert torch.isfinite(found).all()
        assert torch.equal(last.running_var, before)


def test_subtracted_background_leaves_what_moves():
    torch.manual_seed(0)
    encoder = build_encoder("r3d_small", 3, subtract_background=True).eval()
    clips = torch.randn(2, 3, 4, 32, 32)
    torch.testing.assert_close(encoder(clips), encoder(clips + torch.rand(2, 3, 1, 32, 32)), atol=1e-5, rtol=0)
    torch.manual_seed(0)
    plain = build_encoder("r3d_small", 3).eval()
    torch.testing.assert_close(encoder(clips), plain(clips - clips.mean(2, keepdim=True)), atol=1e-6, rtol=0)
    assert not torch.allclose(plain(clips), encoder(clips), atol=1e-4)

"""Mining figures against plain counting, the worth of views, the objective against its formula, offline tables."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr

import cascade_engine as ce
from cascade_engine.errors import CascadeError, InvalidInput, NotFound, SchemaMismatch
from cascade_engine.mining import Positives
from cascade_engine.training.config import LossConfig, PhaseConfig
from cascade_engine.training.metrics import MiningMetrics, worth
from cascade_engine.training.objective import Contrast, Objective
from cascade_engine.training.parallel import World
from cascade_engine.training.positives import PositiveVideos, mine_into

LABEL = np.array([0, 0, 0, 1, 1, 1, 1, -1])
GROUP = np.array([0, 0, 1, 2, 2, 3, 3, 4])


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def bank_of(videos, width=4, seed=0):
    return ce.Bank({"rgb": unit(len(videos), width, seed=seed)}, torch.tensor(videos))


def found(index):
    index = torch.tensor(index)
    return Positives(index=index, similarity=torch.where(index >= 0, 1.0, -torch.inf))


def test_figures_are_what_counting_gives():
    metrics = MiningMetrics(LABEL, GROUP, np.arange(8))
    bank = bank_of([0, 1, 2, 3, 4, 5, 6, 7, 0])
    # slots are videos here, but slot 8 is video 0 again
    metrics.add(found([[1, 3], [8, 2], [4, -1]]), bank, torch.tensor([0, 1, 3]))
    metrics.add(found([[5, 7], [0, 1]]), bank, torch.tensor([4, 7]))
    figures = metrics.figures()
    # queries 0: 1 right, 3 wrong; 1: video 0 and 2 right; 3: 4 right; 4: 5 right, 7 wrong; 7 is unlabelled
    assert figures["precision"] == 5 / 7
    assert figures["recall_at_1"] == 4 / 4
    # class 0 was rightly mined in videos 0, 1, 2 of 3; class 1 in 4, 5 of 3, 4, 5, 6
    assert figures["class_recall_video"] == np.median([3 / 3, 2 / 4])
    assert figures["class_recall_group"] == np.median([2 / 2, 2 / 2])
    times = np.array([2, 2, 1, 1, 1, 1, 0, 1], float)
    assert figures["coverage"] == 7 / 8
    assert figures["hubness"] == pytest.approx((((times - times.mean()) / times.std()) ** 3).mean())
    state = metrics.state_dict()
    again = MiningMetrics(LABEL, GROUP, np.arange(8))
    again.load_state_dict(state)
    assert again.figures() == metrics.merged(World()).figures() == figures
    metrics.clear()
    assert metrics.figures() == {}


def test_a_sibling_among_the_positives_is_an_error():
    metrics = MiningMetrics(LABEL, GROUP, np.arange(8))
    with pytest.raises(CascadeError, match="its query's own video"):
        metrics.add(found([[1], [2]]), bank_of([0, 1, 2]), torch.tensor([0, 2]))
    metrics.add(found([[1], [-1]]), bank_of([0, 1, 2]), torch.tensor([0, 2]))


def two_views(collapsed=False, noise=False):
    """64 keys of 32 videos in 4 classes; rgb knows the class, flow too unless it is noise or one direction."""
    generator = torch.Generator().manual_seed(0)
    video = torch.arange(64) % 32
    label = video % 4
    centre = torch.eye(8)[label] * 2
    own = torch.randn(32, 8, generator=generator)[video] * 0.3
    make = lambda: torch.nn.functional.normalize(  # noqa: E731
        centre + own + 0.1 * torch.randn(64, 8, generator=generator), dim=1
    )
    keys = {"rgb": make(), "flow": make()}
    if noise:
        keys["flow"] = unit(64, 8, seed=5)
    if collapsed:
        keys["flow"] = torch.nn.functional.normalize(torch.ones(64, 8) + 0.01 * keys["flow"], dim=1)
    return keys, video, (np.arange(32) % 4)


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [({}, []), ({"noise": True}, ["noise", "alone"]), ({"collapsed": True}, ["collapsed"])],
)
def test_the_worth_of_the_oracle(spoilt, said):
    keys, video, label = two_views(**spoilt)
    bank = ce.Bank({view: value[:48] for view, value in keys.items()}, video[:48])
    queries = {view: value[48:] for view, value in keys.items()}
    plan = ce.CascadePlan.parse("flow:5" if "noise" in spoilt else "flow:24,rgb:12,flow:4")
    if "noise" in spoilt:
        plan = ce.CascadePlan.parse("rgb:24,flow:4")
    told = worth(plan, queries, bank, video[48:], label)
    warnings = told.warnings()
    assert len(warnings) == len(said)
    assert all(word in text for word, text in zip(said, warnings, strict=True))
    assert told.chance == 4 / 48
    if not spoilt:
        assert told.plan_precision == told.precision["rgb"] == 1.0
        assert told.instance["rgb"] > 0.9
        assert told.agreement > 3 * told.chance
    if "noise" in spoilt:
        assert told.agreement < 0.25
        assert 0.3 < told.instance["flow"] < 0.6


def test_worth_needs_no_labels():
    keys, video, label = two_views()
    bank = ce.Bank({view: value[:48] for view, value in keys.items()}, video[:48])
    queries = {view: value[48:] for view, value in keys.items()}
    told = worth(ce.CascadePlan.parse("flow:24,rgb:4"), queries, bank, video[48:], np.full_like(label, -1))
    assert told.precision == {}
    assert told.plan_precision is None
    assert told.warnings() == []


def contrast(bank_videos, **changes):
    values = {
        "query": unit(3, 4, seed=1).requires_grad_(),
        "keys": {"rgb": unit(3, 4, seed=2), "flow": unit(3, 4, seed=3)},
        "video_id": torch.tensor([0, 1, 9]),
        "label": torch.tensor([0, 1, -1]),
    }
    bank = ce.Bank(
        {"rgb": unit(len(bank_videos), 4, seed=4), "flow": unit(len(bank_videos), 4, seed=5)},
        torch.tensor(bank_videos),
        label=torch.tensor([video % 2 for video in bank_videos]),
    )
    return Contrast(**(values | changes)), bank


def formula(batch, bank, view, member, extra=None, temperature=0.07):
    """-log of the positives' share, in float64."""
    keys = torch.cat([bank.keys[view], extra]) if extra is not None else bank.keys[view]
    scores = torch.cat([(batch.query * batch.keys[view]).sum(1, keepdim=True), batch.query @ keys.T], 1).double()
    member = torch.cat([torch.ones(3, 1, dtype=torch.bool), member], 1)
    if extra is not None:
        member = torch.cat([member, torch.zeros(3, len(extra), dtype=torch.bool)], 1)
    scores = scores / temperature
    return (scores.logsumexp(1) - scores.masked_fill(~member, -torch.inf).logsumexp(1)).mean()


VIDEOS = [0, 1, 2, 3, 4, 5, 0]


def objective(**changes):
    phase = PhaseConfig(name="p", train="rgb", oracles=("flow",), **changes)
    return Objective(phase=phase, loss=LossConfig(), plan=phase.cascade())


def siblings(batch, bank):
    return batch.video_id[:, None] == bank.video_id[None]


def test_own_keys_alone_and_siblings_as_positives():
    batch, bank = contrast(VIDEOS)
    got = objective()(batch, bank, mining=True, generator=None)
    assert got.positives is None
    assert torch.allclose(got.loss.double(), formula(batch, bank, "rgb", siblings(batch, bank)), atol=1e-5)


@pytest.mark.parametrize("anchor", ["query", "key"])
@pytest.mark.parametrize("pairs", ["same", "cross", "both"])
def test_mined_positives_of_the_same_and_of_the_other_view(anchor, pairs):
    batch, bank = contrast(VIDEOS)
    plan = "rgb:4,flow:2"
    got = objective(plan=plan, anchor=anchor, pairs=pairs)(batch, bank, mining=True, generator=None)
    queries = {"rgb": batch.query.detach() if anchor == "query" else batch.keys["rgb"], "flow": batch.keys["flow"]}
    want = ce.mine(ce.CascadePlan.parse(plan), queries, bank, batch.video_id)
    assert torch.equal(got.positives.index, want.index)
    member = siblings(batch, bank)
    for row, slots in enumerate(want.index.tolist()):
        member[row, slots] = True
    each = {view: formula(batch, bank, view, member) for view in ("rgb", "flow")}
    expected = {"same": each["rgb"], "cross": each["flow"], "both": (each["rgb"] + each["flow"]) / 2}[pairs]
    assert torch.allclose(got.loss.double(), expected, atol=1e-5)
    got.loss.backward()
    assert torch.isfinite(batch.query.grad).all()


def test_nothing_is_mined_while_the_bank_fills():
    batch, bank = contrast(VIDEOS)
    assert objective(plan="flow:2")(batch, bank, mining=False, generator=None).positives is None


def test_spoilt_clips_are_negatives_of_every_query():
    extra = unit(6, 4, seed=9)
    batch, bank = contrast(VIDEOS, spoilt=extra)
    got = objective()(batch, bank, mining=True, generator=None)
    assert torch.allclose(got.loss.double(), formula(batch, bank, "rgb", siblings(batch, bank), extra), atol=1e-5)


def test_keys_of_the_batch_are_negatives_and_the_own_key_is_none():
    """All views' keys of the whole batch come along; here the queries are the first three of five."""
    rest = unit(2, 4, seed=11)
    batch, bank = contrast(VIDEOS)
    own = batch.keys["rgb"]
    companions = {"rgb": torch.cat([own, rest]), "flow": unit(5, 4, seed=12)}
    batch = replace(batch, companions=companions, companion_id=torch.tensor([0, 1, 9, 20, 21]))
    asked = replace(objective(), loss=LossConfig(in_batch=True, siblings="ignore"))
    got = asked(batch, bank, mining=True, generator=None)
    keys = torch.cat([own, rest, bank.keys["rgb"]])
    video = torch.cat([batch.companion_id, torch.as_tensor(bank.video_id)])
    scores = (batch.query @ keys.T).double() / 0.07
    mine = (batch.query * own).sum(1).double() / 0.07
    others = scores.masked_fill(batch.video_id[:, None] == video[None], -torch.inf)
    want = (torch.cat([mine[:, None], others], 1).logsumexp(1) - mine).mean()
    assert torch.allclose(got.loss.double(), want, atol=1e-5)
    nothing = ce.Bank({view: keys[:0] for view, keys in bank.keys.items()}, torch.zeros(0, dtype=torch.int64))
    assert asked(batch, nothing, mining=False, generator=None).loss > 0.1


def test_keys_of_the_batch_need_siblings_left_out():
    with pytest.raises(InvalidInput, match="in_batch: expected siblings = 'ignore'"):
        LossConfig(in_batch=True)


def test_labels_as_positives():
    batch, bank = contrast(VIDEOS)
    got = objective(positives="labels")(batch, bank, mining=True, generator=None)
    assert got.positives.index.tolist() == [[2, 4], [3, 5], [-1, -1]]


def test_a_store_is_mined_in_tiles_and_goes_on_where_it_stopped(tmp_path):
    video = np.arange(50) // 2
    bank = ce.Bank(
        {"rgb": unit(50, 8).numpy(), "flow": unit(50, 6, seed=1).numpy()}, video, clip_id=np.arange(50) + 100
    )
    plan = ce.CascadePlan.parse("flow:20,rgb:3")
    want = ce.mine_self(plan, bank)

    class Stop(Exception):
        pass

    def stop(done, _):
        if done >= 21:
            raise Stop

    with pytest.raises(Stop):
        mine_into(tmp_path / "p.zarr", bank, plan, origin={"store": "s"}, tile=7, progress=stop)
    with pytest.raises(SchemaMismatch, match="21 of 50 rows"):
        PositiveVideos.read(tmp_path / "p.zarr")
    with pytest.raises(SchemaMismatch, match="expected a table of"):
        mine_into(tmp_path / "p.zarr", bank, plan, origin={"store": "other"})
    assert mine_into(tmp_path / "p.zarr", bank, plan, origin={"store": "s"}, tile=9) == 29
    assert mine_into(tmp_path / "p.zarr", bank, plan, origin={"store": "s"}) == 0
    group = zarr.open_group(tmp_path / "p.zarr", mode="r")
    assert np.array_equal(group["index"][:], want.index)
    assert np.array_equal(group["similarity"][:], want.similarity)
    assert np.array_equal(group["clip_id"][:], bank.clip_id)

    table = PositiveVideos.read(tmp_path / "p.zarr")
    queue = ce.Bank({"rgb": unit(9, 8)}, torch.tensor([3, 7, 3, 1, 20, 24, 0, 11, 5]))
    asked = torch.tensor([0, 24, 99])
    got = table.find(asked, queue)
    for row, query in enumerate(asked.tolist()):
        positive = set(video[want.index[video == query]].ravel().tolist()) if query < 25 else set()
        slots = [slot for slot, of in enumerate(queue.video_id.tolist()) if of in positive and of != query]
        assert [slot for slot in got.index[row].tolist() if slot >= 0] == slots
    with pytest.raises(NotFound, match="positives: expected a table"):
        PositiveVideos.read(tmp_path / "none.zarr")


def test_a_table_interrupted_while_it_was_made_is_made_and_other_files_are_left_alone(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    bank = ce.Bank({"rgb": rng.standard_normal((12, 4)).astype(np.float32)}, np.arange(12) // 2)
    plan = ce.CascadePlan.parse("rgb:2")
    with monkeypatch.context() as killed:
        killed.setattr(zarr.core.attributes.Attributes, "update", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mine_into(tmp_path / "half.zarr", bank, plan, origin={})
    assert mine_into(tmp_path / "half.zarr", bank, plan, origin={}) == 12
    assert PositiveVideos.read(tmp_path / "half.zarr").videos.shape[0] == 6
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "letter.txt").write_text("dear")
    for target in (tmp_path / "plain", tmp_path / "plain" / "letter.txt"):
        with pytest.raises(SchemaMismatch, match=r"expected a table of positives, or nothing; found letter.txt"):
            mine_into(target, bank, plan, origin={})
    assert [each.name for each in (tmp_path / "plain").iterdir()] == ["letter.txt"]

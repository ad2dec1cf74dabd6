"""Training on clips in memory: the course of a run, its folder, interruption and resuming, several processes."""

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from moving import MovingSquares

import cascade_engine as ce
from cascade_engine.errors import CheckpointError, InvalidInput, StaleBank
from cascade_engine.training import checkpoint
from cascade_engine.training.batches import KEY, QUERY, Batches, span
from cascade_engine.training.config import (
    AugmentConfig,
    BankConfig,
    ClipConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    PhaseConfig,
    TrainConfig,
)
from cascade_engine.training.data import augmentation
from cascade_engine.training.loop import prepare
from cascade_engine.training.parallel import World
from cascade_engine.training.phases import first_mining, phase_rows
from cascade_engine.training.presets import PRESETS, preset
from cascade_engine.training.run import Run
from cascade_engine.video.index import VideoIndex

PHASES = (
    PhaseConfig(name="flow-0", train="flow", epochs=1),
    PhaseConfig(name="rgb-1", train="rgb", oracles=("flow",), plan="flow:50%,rgb:25%,flow:2", epochs=4),
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(folder, **changes):
    """20 training videos in batches of 8, 8 and 4: a phase of 3 batches, then one of 12."""
    config = TrainConfig(
        name="run",
        clip=ClipConfig(frames=4, size=16),
        model=ModelConfig(dim=16, momentum=0.9),
        bank=BankConfig(size=16),
        optim=OptimConfig(batch=8, threads=1),
        output=OutputConfig(runs=str(folder), log_every=1, checkpoint_every=4, tensorboard=False),
        phase=PHASES,
    )
    return replace(config, **changes)


def losses(run):
    with (run.folder / "metrics.csv").open() as file:
        return [(row["step"], row["phase"], row["loss"], row["precision"]) for row in csv.DictReader(file)]


def weights(run, view="rgb"):
    return run.encoder(view).state_dict()


def same(left, right):
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_leaves_what_others_read(tmp_path):
    seen = []
    run = ce.train(small(tmp_path), cache=MovingSquares(), report=seen.append)
    assert run.phases == ("flow-0", "rgb-1")
    assert [now.step for now in seen] == [*range(1, 4), *range(1, 13)]
    assert [now.filled for now in seen[:3]] == [0.5, 1.0, 1.0]
    assert seen[3].precision is None, "nothing is mined before the bank is full"
    assert 0 <= seen[-1].precision <= 1
    rows = Run.open(run.folder).metrics
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert all(row["loss"] > 0 for row in rows[1:3])
    assert {"precision", "coverage", "hubness", "agreement"} <= {
        key for key, value in rows[-1].items() if value is not None
    }
    assert len(run.index) == 24
    assert run.labels == ("way0", "way1", "way2", "way3")
    assert run.versions["seed"] == 0
    assert run.versions["torch"].startswith(torch.__version__.split("+")[0])

    store = ce.FeatureStore.open(run.store_path)
    assert set(store.phases) == {"flow-0", "rgb-1"}
    with ce.FeatureStore.open(run.store_path, phase="rgb-1") as last:
        assert last.sealed
        assert last.rows == 24 * 4  # 10 frames in half-overlapping windows of 4
        bank = last.bank(views=("rgb", "flow"), where="split == 'train'")
        assert bank.size == 20 * 4
        found = ce.mine_self(ce.CascadePlan.parse("flow:10,rgb:3"), bank)
        videos = np.asarray(bank.video_id)
        assert not (videos[np.asarray(found.index)] == videos[:, None]).any()
        assert last.bank(views=("rgb_backbone",)).keys["rgb_backbone"].shape == (96, run.encoder("rgb").feature_dim)
        first = ce.FeatureStore.open(run.store_path, phase="flow-0")
        assert np.array_equal(first.features("flow"), last.features("flow")), "a frozen oracle changes nothing"
        assert not np.array_equal(first.features("rgb"), last.features("rgb"))


def test_the_features_are_those_of_the_saved_encoder(tmp_path):
    from cascade_engine.video.augment import centre

    cache = MovingSquares(count=8, tests=4)
    run = ce.train(small(tmp_path, phase=PHASES[:1]), cache=cache)
    with ce.FeatureStore.open(run.store_path, phase="flow-0") as store, torch.no_grad():
        start = int(store.column("start_frame")[5])
        row = int(store.column("video_id")[5])
        clip = centre("flow", cache.frames("flow", row, start, 4)[None], 16)
        assert torch.allclose(
            run.encoder("flow")(clip)[0], torch.from_numpy(store.features("flow")[5].copy()), atol=1e-5
        )


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    first = ce.train(small(tmp_path / "a"), cache=MovingSquares())
    again = ce.train(small(tmp_path / "b"), cache=MovingSquares())
    other = ce.train(small(tmp_path / "c", seed=1), cache=MovingSquares())
    assert same(weights(first), weights(again))
    assert losses(first) == losses(again)
    assert not same(weights(first), weights(other))


class Crash(Exception):
    pass


def crash_at(step):
    count = iter(range(1, 1000))

    def report(_):
        if next(count) == step:
            raise Crash

    return report


@pytest.mark.parametrize(
    "bank", [BankConfig(size=16), BankConfig(kind="indexed"), BankConfig(size=13, dtype="bfloat16")]
)
def test_a_run_that_crashed_goes_on_bit_for_bit(tmp_path, bank):
    changes = {"bank": bank, "loss": LossConfig(self_positive=0.5, negatives=("repeat", "shuffle"))}
    straight = ce.train(small(tmp_path / "a", **changes), cache=MovingSquares())
    config = small(tmp_path / "b", **changes)
    for step in (2, 9):  # before the first checkpoint of the phase, and between two of the next
        with pytest.raises(Crash):
            ce.train(config, resume=True, cache=MovingSquares(), report=crash_at(step))
    resumed = ce.train(config, resume=True, cache=MovingSquares())
    assert same(weights(straight), weights(resumed))
    assert losses(straight) == losses(resumed)
    for view in ("rgb", "flow"):
        features = [ce.FeatureStore.open(run.store_path, phase="rgb-1").features(view) for run in (straight, resumed)]
        assert np.array_equal(*features)


@pytest.mark.parametrize("every", [4, 1000])
def test_rows_of_figures_outlast_any_stop(tmp_path, every):
    straight = losses(ce.train(small(tmp_path / "a"), cache=MovingSquares()))
    config = small(tmp_path / "b")
    config = replace(config, output=replace(config.output, checkpoint_every=every))
    with pytest.raises(Crash):
        ce.train(config, cache=MovingSquares(), report=crash_at(5))  # in the second phase, before its first checkpoint
    assert losses(ce.train(config, resume=True, cache=MovingSquares())) == straight
    assert losses(ce.train(config, resume=True, cache=MovingSquares())) == straight, "a complete run stays as it is"


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import cascade_engine as ce
from moving import MovingSquares
from cascade_engine.training.config import load_config

def report(now, count=iter(range(1, 99))):
    if next(count) == 8:
        os.kill(os.getpid(), signal.SIGKILL)

ce.train(load_config(Path({config!r})), cache=MovingSquares(), report=report)
"""


def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path):
    from cascade_engine.training.settings import to_toml

    straight = ce.train(small(tmp_path / "a"), cache=MovingSquares())
    config = small(tmp_path / "b")
    (tmp_path / "c.toml").write_text(to_toml(config))
    script = KILLED.format(tests=str(Path(__file__).parent), config=str(tmp_path / "c.toml"))
    done = subprocess.run([sys.executable, "-c", script], check=False, cwd=tmp_path)  # not the sources: they lack C++
    assert done.returncode == -signal.SIGKILL
    resumed = ce.train(config, resume=True, cache=MovingSquares())
    assert same(weights(straight), weights(resumed))
    assert losses(straight) == losses(resumed)


@pytest.mark.parametrize("keep", [0, 2])
def test_an_interruption_saves_the_step_and_stops(tmp_path, keep):
    config = small(tmp_path, output=replace(small(tmp_path).output, keep=keep))
    count, before = iter(range(1, 1000)), signal.getsignal(signal.SIGINT)

    def report(_):
        if next(count) == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        ce.train(config, cache=MovingSquares(), report=report)
    saved = checkpoint.load(checkpoint.newest(tmp_path / "run" / "checkpoints"))
    assert saved["step"] in (6, 7)
    assert signal.getsignal(signal.SIGINT) == before
    resumed = ce.train(config, resume=True, cache=MovingSquares())
    assert same(weights(resumed), weights(ce.train(small(tmp_path / "straight"), cache=MovingSquares())))


def test_a_run_is_not_overwritten_nor_resumed_with_another_config(tmp_path):
    config = small(tmp_path, phase=PHASES[:1])
    ce.train(config, cache=MovingSquares())
    with pytest.raises(InvalidInput, match="holds a run already"):
        ce.train(config, cache=MovingSquares())
    with pytest.raises(InvalidInput, match="begun with another config"):
        ce.train(replace(config, seed=5), resume=True, cache=MovingSquares())


def test_what_changes_no_weight_may_change_when_resuming(tmp_path):
    straight = ce.train(small(tmp_path / "straight"), cache=MovingSquares())
    config = small(tmp_path)
    with pytest.raises(Crash):
        ce.train(config, cache=MovingSquares(), report=crash_at(9))
    output = replace(config.output, log_every=100, checkpoint_every=2, keep=1)
    run = ce.train(
        replace(config, output=output, data=replace(config.data, workers=1)), resume=True, cache=MovingSquares()
    )
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4, 5, 6, 7, 9, 12, 15], "logged by step, then by epoch"
    assert [path.name for path in checkpoint.steps(run.checkpoints)] == ["step-000000013.pt"]
    assert same(weights(run), weights(straight))
    assert Run.open(run.folder).config == config, "the config that it was begun with stays"


@pytest.mark.parametrize(("asked", "got"), [("auto", 1), ("cuda", 1), ("cuda:0", 0)])
def test_processes_take_a_gpu_each_unless_one_is_named(tmp_path, monkeypatch, asked, got):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    tried = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: tried.append(device))
    assert prepare(small(tmp_path, device=asked), World(size=4, rank=3)) == torch.device("cuda", got) == tried[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can be used here")
def test_a_device_that_is_not_here_is_refused_before_a_run_is_made(tmp_path):
    with pytest.raises(InvalidInput, match="device: 'cuda' cannot be used here: "):
        ce.train(small(tmp_path, device="cuda"), cache=MovingSquares())
    assert not (tmp_path / "run").exists()


def turned(cache):
    """The same videos with their labels one place on."""
    names = [entry.label for entry in cache.index]
    cache.index = VideoIndex(
        [replace(entry, label=name) for entry, name in zip(cache.index, names[1:] + names[:1], strict=True)]
    )
    return cache


def moved(cache, folder):
    cache.index = VideoIndex([replace(entry, path=folder / entry.path) for entry in cache.index])
    return cache


@pytest.mark.parametrize("step", [5, 9])  # a phase is done; a step of the next is saved
def test_a_run_is_not_resumed_with_other_videos(tmp_path, step):
    config = small(tmp_path)
    with pytest.raises(Crash):
        ce.train(config, cache=MovingSquares(), report=crash_at(step))
    index = (tmp_path / "run" / "index.csv").read_text()
    with pytest.raises(InvalidInput, match="begun with 24 videos, got 60"):
        ce.train(config, resume=True, cache=MovingSquares(count=60))
    with pytest.raises(InvalidInput, match=r"begun with other videos: 0 was \('0.mp4', 'way0', .* 'way1'"):
        ce.train(config, resume=True, cache=turned(MovingSquares()))
    assert (tmp_path / "run" / "index.csv").read_text() == index
    run = ce.train(config, resume=True, cache=moved(MovingSquares(), tmp_path / "elsewhere"))
    assert same(weights(run), weights(ce.train(small(tmp_path / "straight"), cache=MovingSquares())))


def test_checkpoints_are_pruned_and_half_a_file_is_never_seen(tmp_path):
    for step in (4, 8, 12):
        checkpoint.save(checkpoint.step_path(tmp_path, step), {"step": step})
    checkpoint.prune(tmp_path, 2)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-000000008.pt", "step-000000012.pt"]
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(checkpoint.step_path(tmp_path, 16), {"step": lambda: 0})
    assert checkpoint.newest(tmp_path).name == "step-000000012.pt"
    assert len(list(tmp_path.iterdir())) == 2
    torch.save({"step": 1}, tmp_path / "step-000000020.pt")
    with pytest.raises(CheckpointError, match="expected format 1, got None"):
        checkpoint.load(checkpoint.newest(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": OptimConfig(batch=8, accumulate=2, clip_norm=1.0, optimizer="sgd", precision="bfloat16")},
        {"phase": (*PHASES[:1], replace(PHASES[1], pairs="both", schedule="steps", warmup=1.0, anchor="key"))},
        {"phase": (*PHASES[:1], replace(PHASES[1], pairs="cross", inherit="initial", oracle_from="initial"))},
        {"phase": (replace(PHASES[1], positives="labels", plan="", oracles=()),)},
        {"loss": LossConfig(reduction="mean_log", self_positive="never", siblings="negative")},
        {"clip": ClipConfig(frames=3, size=16, stride=2, apart=0), "model": ModelConfig(dim=8, norm_groups=1)},
        {"loss": LossConfig(in_batch=True, siblings="ignore"), "model": ModelConfig(dim=8, norm="group")},
    ],
)
def test_options_train(tmp_path, changes):
    run = ce.train(small(tmp_path, **changes), cache=MovingSquares())
    rows = run.metrics
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert not same(weights(run), run.encoder("rgb", "initial").state_dict())
    if "optim" in changes:
        assert [row["step"] for row in rows] == [2, 3, 5, 7, 9, 11, 13, 15], "steps of two batches, the last of one"


@pytest.mark.parametrize(("accumulate", "steps"), [(2, [7, 9, 13, 15]), (8, [11, 11, 15, 15])])
def test_every_epoch_has_its_own_figures_wherever_steps_end(tmp_path, accumulate, steps):
    """With weights that do not move, an epoch's figures do not hang on how many of its batches make a step."""
    phases = tuple(replace(phase, lr=1e-30) for phase in PHASES)
    optim = small(tmp_path).optim
    straight = ce.train(small(tmp_path / "a", phase=phases), cache=MovingSquares())
    config = small(tmp_path / "b", phase=phases, optim=replace(optim, accumulate=accumulate))
    with pytest.raises(Crash):
        ce.train(config, cache=MovingSquares(), report=crash_at(1 + 8 // accumulate))
    run = ce.train(config, resume=True, cache=MovingSquares())
    columns = ("epoch", "precision", "coverage", "hubness", "class_recall_group", "agreement", "plan_precision")

    def figures(run):
        rows = [row for row in run.metrics if row["phase"] == "rgb-1" and row["coverage"] is not None]
        return [row["step"] for row in rows], [[row[column] for column in columns] for row in rows]

    assert figures(run) == (steps, figures(straight)[1])
    assert [row[0] for row in figures(run)[1]] == [1, 2, 3, 4]


def test_a_phase_may_have_a_bank_of_its_own_size(tmp_path):
    first, second = PHASES
    sizes = {}

    def note(now):
        sizes.setdefault(now.phase, []).append(now.filled)

    config = small(tmp_path, phase=(replace(first, bank_size=8), second))
    ce.train(config, cache=MovingSquares(), report=note)
    assert sizes["flow-0"] == [1.0, 1.0, 1.0]
    assert sizes["rgb-1"][:3] == [0.5, 1.0, 1.0]


INDEXED = BankConfig(kind="indexed")


@pytest.mark.parametrize(
    ("bank", "mine_from"),
    [(BankConfig(size=16), 0), (BankConfig(size=37), 0.55), (BankConfig(size=40), 1), (INDEXED, 0.55), (INDEXED, 1)],
)
def test_when_mining_begins_is_known_before(tmp_path, bank, mine_from):
    phases = (PHASES[0], replace(PHASES[1], mine_from=mine_from))
    config = small(tmp_path, bank=bank, phase=phases)
    begun = []
    ce.train(config, cache=MovingSquares(), report=lambda now: begun.append((now.phase, now.precision is not None)))
    mined = [step for step, (_, mining) in enumerate(begun[3:]) if mining]
    assert mined[0] == first_mining(config, 1, 20, 3)


def test_a_phase_that_could_never_mine_is_refused_before_a_run_is_made(tmp_path, caplog):
    config = small(tmp_path, bank=BankConfig(size=2048))
    with pytest.raises(InvalidInput, match=r"phase\.2: 4 epochs of 20 videos are 12 batches, and the 2048 keys"):
        ce.train(config, cache=MovingSquares())
    assert not (tmp_path / "run").exists()
    for size, said in ((72, "come after 11"), (32, "")):  # the last batch alone mines; 7 of 12 do
        caplog.clear()
        ce.train(small(tmp_path / str(size), bank=BankConfig(size=size)), cache=MovingSquares())
        assert any("must hold to be mined in" in line and said in line for line in caplog.messages) == bool(said)
    with pytest.raises(InvalidInput, match=r"phase\.2: .* come after 12: it would never mine"):
        ce.train(replace(config, bank=BankConfig(size=77)), cache=MovingSquares())
    alone = small(tmp_path, bank=BankConfig(size=2048), phase=PHASES[:1])
    assert ce.train(alone, cache=MovingSquares()).phases == ("flow-0",), "own keys need no full bank"


def test_a_run_that_never_mines_and_was_begun_is_resumed_with_a_warning(tmp_path, caplog):
    config = small(tmp_path, bank=BankConfig(size=2048))
    Run.create(tmp_path / "run", config)
    run = ce.train(config, resume=True, cache=MovingSquares())
    assert run.metrics[-1]["precision"] is None
    assert any(line.endswith(": it never mines") for line in caplog.messages)


def test_supervised_positives_are_right(tmp_path):
    phase = replace(PHASES[1], positives="labels", plan="", oracles=())
    run = ce.train(small(tmp_path, phase=(phase,)), cache=MovingSquares())
    assert run.metrics[-1]["precision"] == 1.0


def test_training_reads_no_labels(tmp_path):
    cache, blind = MovingSquares(), MovingSquares()
    for entry in blind.index:
        object.__setattr__(entry, "label", None)
    told = ce.train(small(tmp_path / "a"), cache=cache)
    untold = ce.train(small(tmp_path / "b"), cache=blind)
    assert same(weights(told), weights(untold))
    assert untold.metrics[-1]["precision"] is None
    assert untold.metrics[-1]["coverage"] > 0


def batches(tmp_path, world=None, **changes):
    config = small(tmp_path, **changes)
    return Batches(MovingSquares(), config, 1, augmentation(config), world)


def test_batches_do_not_depend_on_workers_or_on_where_one_starts(tmp_path):
    straight = list(batches(tmp_path).loader())
    forked = list(batches(tmp_path, data=replace(small(tmp_path).data, workers=2)).loader(5))
    assert len(straight) == 12
    assert [len(batch.rows) for batch in straight[:3]] == [8, 8, 4]
    for one, other in zip(straight[5:], forked, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.query, other.query)
        assert all(torch.equal(one.keys[view], other.keys[view]) for view in ("rgb", "flow"))
    for epoch in range(4):
        seen = torch.cat([batch.rows for batch in straight[epoch * 3 : epoch * 3 + 3]])
        assert sorted(seen.tolist()) == list(range(20)), "every training video once, no test video"


@pytest.mark.parametrize("negatives", [(), ("repeat", "shuffle"), ("shuffle", "repeat")])
def test_the_shares_of_two_processes_are_the_joint_batch(tmp_path, negatives):
    loss = LossConfig(negatives=negatives)
    joint = batches(tmp_path, loss=loss)
    halves = [batches(tmp_path, World(size=2, rank=rank), loss=loss) for rank in (0, 1)]
    for item in (0, 2):
        whole, parts = joint[item], [half[item] for half in halves]
        assert all(torch.equal(part.rows, whole.rows) for part in parts)
        assert torch.equal(torch.cat([part.query for part in parts]), whole.query)
        for view in whole.keys:
            assert torch.equal(torch.cat([part.keys[view] for part in parts]), whole.keys[view])


def test_a_key_is_cut_at_most_so_far_from_its_query(tmp_path):
    clip = ClipConfig(frames=4, size=16)
    room = np.tile([1, 3, 20, 100], 50)
    distance = {}
    for apart in (-1, 0, 2):
        cutter = batches(tmp_path, clip=replace(clip, apart=apart))
        query, key = (cutter._starts(room, purpose, 0, 0) for purpose in (QUERY, KEY))
        assert all(((starts >= 0) & (starts < room)).all() for starts in (query, key))
        distance[apart] = set((key - query).tolist())
    assert distance[0] == {0}
    assert distance[2] == {-2, -1, 0, 1, 2}
    assert min(distance[-1]) < -20
    assert max(distance[-1]) > 20


def test_one_clip_varied_by_nothing_is_its_own_key(tmp_path):
    still = AugmentConfig(flip=0, area=1, jitter=0, gray=0)
    clip = ClipConfig(frames=4, size=16)
    batch = {}
    for apart in (-1, 0):
        config = small(tmp_path, clip=replace(clip, apart=apart), augment=still, model=ModelConfig(norm_groups=1))
        batch[apart] = Batches(MovingSquares(), config, 1, replace(augmentation(config), ratio=(1, 1)))[0]
    assert torch.equal(batch[0].query, batch[0].keys["rgb"])
    assert not torch.equal(batch[-1].query, batch[-1].keys["rgb"])
    assert span(ClipConfig(frames=3, stride=2)) == 5


def test_presets_are_whole_courses():
    for name in PRESETS:
        assert preset(name).name == name
    rows = {row.name: row for row in phase_rows(preset("cpr"))}
    assert rows["rgb-1"].inherits == "rgb-0"
    assert rows["rgb-1"].oracles == "flow of flow-0"
    assert rows["flow-1"].oracles == "rgb of rgb-1"
    assert [rows[f"rgb-{cycle}"].positives for cycle in (1, 2, 3)] == ["cpr, k = 1", "cpr, k = 3", "cpr, k = 5"]
    with pytest.raises(InvalidInput, match="preset: expected one of infonce"):
        preset("moco")


TOGETHER = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
import cascade_engine as ce
from moving import MovingSquares
from cascade_engine.training.config import load_config
torch.set_num_threads(1)

def report(now, count=iter(range(1, 99))):
    if next(count) == {die}:
        os._exit(9)

sys.exit(0 if ce.train(load_config(Path({config!r})), cache=MovingSquares(count={count}), report=report) else 1)
"""


def together(tmp_path, config, *, die=0, count=24):
    """Two processes as torchrun would start them: (return code, stderr) of each."""
    from cascade_engine.training.settings import to_toml

    (tmp_path / "two.toml").write_text(to_toml(config))
    values = {"tests": str(Path(__file__).parent), "config": str(tmp_path / "two.toml"), "die": die, "count": count}
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER.format(**values)],
            env={**shared, "RANK": str(rank)},
            cwd=tmp_path,  # elsewhere the sources could be found before what is installed
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    return [(process.communicate(timeout=120)[1], process.returncode)[::-1] for process in started]


@pytest.mark.parametrize(
    ("loss", "size"),
    [
        (LossConfig(), 16),
        (LossConfig(in_batch=True, siblings="ignore"), 16),
        (LossConfig(self_positive="never", siblings="ignore"), 3),  # so few keys that some queries have no positive
        (LossConfig(self_positive=0.5, negatives=("repeat", "shuffle")), 16),
    ],
)
def test_two_processes_train_as_one(tmp_path, loss, size):
    """To rounding, where the positives do not hang on it: own keys, then labels; mining may decide a tie otherwise."""
    # 23 training videos, not 20: batches of 8, 8 and 7, so the shares of the last are 4 and 3
    phases = (PHASES[0], replace(PHASES[1], positives="labels"))
    clip = ClipConfig(frames=4, size=24)  # at 16 batch norm would stand on four numbers, and make much of roundings
    changes = {"phase": phases, "loss": loss, "clip": clip, "bank": BankConfig(size=size)}
    alone = ce.train(small(tmp_path / "a", **changes), cache=MovingSquares(count=27))
    for code, errors in together(tmp_path, small(tmp_path / "b", **changes), count=27):
        assert code == 0, errors
    both = Run.open(tmp_path / "b" / "run")
    for one, other in zip(alone.metrics, both.metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        for exact in ("step", "filled", "precision", "coverage", "class_recall_video"):
            assert one[exact] == other[exact], exact
    for name, value in weights(alone).items():
        assert torch.allclose(value.float(), weights(both)[name].float(), atol=1e-2), name
    stores = [ce.FeatureStore.open(run.store_path, phase="rgb-1") for run in (alone, both)]
    assert np.allclose(stores[0].features("rgb"), stores[1].features("rgb"), atol=1e-2)


def test_a_lost_process_stops_the_others_with_a_reason(tmp_path):
    started = time.monotonic()
    (first, _), (second, errors) = together(tmp_path, small(tmp_path), die=4)
    assert first == 9
    assert second not in (0, 9)
    assert "another process was lost" in errors, errors
    assert time.monotonic() - started < 90


def test_stale_banks_are_refused():
    from cascade_engine.training.banks import IndexedBank

    bank = IndexedBank(torch.tensor([3, 5, 8]), {"rgb": 2}, momentum=0.5)
    unit = torch.nn.functional.normalize
    bank.push({"rgb": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}, torch.tensor([3, 8]), torch.tensor([3, 8]))
    shown = bank.bank()
    assert (bank.filled, bank.size, len(shown)) == (2, 3, 2)
    assert shown.clip_id.tolist() == [3, 8]
    bank.push({"rgb": torch.tensor([[0.0, 1.0]])}, torch.tensor([3]), torch.tensor([3]), torch.tensor([7]))
    with pytest.raises(StaleBank):
        shown.ensure_fresh()
    moved = bank.bank()
    assert torch.allclose(moved.keys["rgb"][0], unit(torch.tensor([0.5, 0.5]), dim=0))
    assert moved.label.tolist() == [7, -1]
    with pytest.raises(InvalidInput, match="clip_id: expected different videos"):
        bank.push({"rgb": torch.ones(2, 2)}, torch.tensor([3, 3]), torch.tensor([3, 3]))
    with pytest.raises(InvalidInput, match="clip_id: expected different videos"):
        bank.push({"rgb": torch.ones(1, 2)}, torch.tensor([4]), torch.tensor([4]))
    other = IndexedBank(torch.tensor([3, 5, 9]), {"rgb": 2})
    with pytest.raises(CheckpointError, match="other videos or views"):
        other.load_state_dict(bank.state_dict())

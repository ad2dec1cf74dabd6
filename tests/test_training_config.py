"""The config tree: strict, overridable, and written so that it reads back; the run folder that carries it."""

import pytest
import torch

from cascade_engine.errors import CheckpointError, InvalidInput
from cascade_engine.models import build_encoder
from cascade_engine.training.config import LossConfig, PhaseConfig, TrainConfig, load_config
from cascade_engine.training.run import Run
from cascade_engine.training.settings import build, override, to_toml, to_values

PHASES = (
    PhaseConfig(name="rgb", train="rgb", epochs=2),
    PhaseConfig(name="flow", train="flow", oracles=("rgb",), plan="cpr", top_k=2, lr=5e-4),
    PhaseConfig(name="rgb2", train="rgb", oracles=("flow",), plan="flow:50%,rgb:25%,flow:5", top_k=3),
)


def test_what_is_written_reads_back(tmp_path):
    config = TrainConfig(name='odd "name" # x', phase=PHASES, loss=LossConfig(self_positive=0.9, negatives=("repeat",)))
    text = to_toml(config)
    (tmp_path / "c.toml").write_text(text)
    assert load_config(tmp_path / "c.toml") == config
    assert build(TrainConfig, to_values(config)) == config
    lines = text.splitlines()
    assert all("# " in line for line in lines if line.startswith(("seed", "temperature", "momentum")))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sed=1", "sed: no such key; there are name, seed"),
        ("optim.btch=1", "optim.btch: no such key"),
        ("optim.batch=1.5", "optim.batch: expected a whole number, got 1.5"),
        ("optim.batch=true", "optim.batch: expected a whole number, got True"),
        ("optim=3", "optim: expected a table"),
        ("seed.x=3", "seed.x: no such key"),
        ("views=rgb", "views: expected a list"),
        ("views=[1]", "views.1: expected a string, got 1"),
        ("loss.reduction=mean", "loss.reduction: expected one of logsumexp, mean_log"),
        ("loss.self_positive=sometimes", "loss.self_positive: expected 'always' or 'never' or a number"),
        ("loss.temperature=0", "loss: temperature: expected a number above 0"),
        ("clip.apart=-2", "clip: expected frames, size and stride of at least 1 and apart of at least -1"),
        ("clip.stride=0", "clip: expected frames, size and stride of at least 1"),
        ("model.encoder=vit", "model: encoder: expected one of r3d_small"),
        ("model.subtract_background=['residual']", "model.subtract_background: expected the run's views rgb, flow"),
        ("phase.4.lr=1", "phase.4.lr: no row '4'; there are 1 to 3: rgb, flow, rgb2"),
        ("phase.2.plan=rgb:5,flow:x", "phase.2: plan: expected a count, a percentage or 'prev' at position 12"),
        ("phase.2.plan=residual:5", "phase.2: plan: expected the views flow, rgb, got 'residual'"),
        ("phase.2.oracles=['residual']", "got 'residual'|plan"),
        ("phase.2.inherit=rgb2", "phase.2.inherit: expected one of latest, initial, rgb, got 'rgb2'"),
        ("phase.3.name=rgb", "phase.3.name: expected a name of its own"),
        ("phase.1.epochs=0", "phase.1: expected epochs of at least 1"),
        ("phase.1.pairs=cross", "phase.1: oracles: expected a view for pairs = 'cross', got none"),
        ("seed=-1", "seed: expected a number from 0 to 18014398509481983, got -1"),
        ("seed=18014398509481984", "seed: expected a number from 0"),
        ("device=gpu", "device: expected auto, cpu, cuda, cuda:1, ..., got 'gpu'"),
        ("data.workers=-1", "data: expected size of at least 1, workers of at least 0, got 64, -1"),
        ("model.dim=0", r"model: expected dim of at least 1 and momentum in \[0, 1\], got 0, 0.999"),
        ("bank.size=0", r"bank: expected size of at least 1, momentum in \[0, 1\), got 0, 0.5"),
        ("loss.self_positive=1.5", "loss: self_positive: expected always, never or a probability, got 1.5"),
        ("loss.temperature=nan", "loss: temperature: expected a number above 0"),
        ("optim.batch=0", "optim: expected batch and accumulate of at least 1, .* got 0, 1, 1e-05, 0.0, 0"),
        ("optim.accumulate=0", "optim: expected batch and accumulate of at least 1"),
        ("optim.threads=-1", "optim: .* threads of at least 0"),
        ("output.log_every=0", "output: expected log_every and checkpoint_every of at least 1"),
        ("output.checkpoint_every=0", "output: expected log_every and checkpoint_every of at least 1"),
        ("output.keep=-1", "output: .* keep of at least 0, got 10, 200, -1"),
        ("seed", "set: expected key=value"),
    ],
)
def test_mistakes_are_refused_with_their_place(assignment, message):
    values = to_values(TrainConfig(phase=PHASES))
    with pytest.raises(InvalidInput, match=message):
        build(TrainConfig, override(values, [assignment]))


def test_any_key_can_be_set():
    values = to_values(TrainConfig(phase=PHASES))
    config = build(TrainConfig, override(values, ["phase.2.top_k=5", "phase.rgb2.lr=2", "name=plain words", "seed=7"]))
    assert (config.phase[1].top_k, config.phase[2].lr, config.name, config.seed) == (5, 2.0, "plain words", 7)
    assert str(config.phase[1].cascade()).endswith("rgb:5")


def test_top_k_replaces_the_last_count():
    assert PHASES[0].cascade() is None
    assert str(PHASES[1].cascade()) == "rgb:50%,flow:25%,rgb:12.5%,flow:6.25%,rgb:3.125%,flow:1.5625%,rgb:2"
    assert str(PHASES[2].cascade()) == "flow:50%,rgb:25%,flow:3"


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(InvalidInput, match="no such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "c.toml").write_text("seed = \n")
    with pytest.raises(InvalidInput, match="line 1"):
        load_config(tmp_path / "c.toml")


def encoders():
    return {"rgb": build_encoder("r3d_small", 3), "flow": build_encoder("r3d_small", 2)}


def test_a_run_hands_out_the_encoders_of_its_phases(tmp_path):
    run = Run.create(tmp_path / "r", TrainConfig(phase=PHASES))
    first, trained = encoders(), encoders()
    run.save_encoders("initial", first)
    assert run.phases == ()
    assert run.trained_in("flow") == "initial"
    run.save_encoders("rgb", {"rgb": trained["rgb"]})
    run.save_encoders("flow", {"flow": trained["flow"]})

    opened = Run.open(tmp_path / "r")
    assert opened.config == run.config
    assert opened.phases == ("rgb", "flow")
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))  # noqa: E731
    assert same(opened.encoder("rgb"), trained["rgb"])
    assert same(opened.encoder("flow", "rgb"), first["flow"])
    assert same(opened.encoder("rgb", "initial"), first["rgb"])
    assert not opened.encoder("flow").training
    with pytest.raises(CheckpointError, match="no such file"):
        opened.encoder("rgb", "rgb2")
    with pytest.raises(InvalidInput, match="phase: expected one of initial, rgb, flow, rgb2, got 'x'"):
        opened.encoder("rgb", "x")
    with pytest.raises(InvalidInput, match="view: expected one of rgb, flow"):
        opened.encoder("residual")
    with pytest.raises(InvalidInput, match="holds a run already"):
        Run.create(tmp_path / "r", run.config)
    with pytest.raises(InvalidInput, match=r"config\.toml"):
        Run.open(tmp_path / "elsewhere")


def test_a_damaged_checkpoint_is_named(tmp_path):
    run = Run.create(tmp_path / "r", TrainConfig(phase=PHASES))
    run.phase_path("initial").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"00-initial\.pt cannot be read"):
        run.encoder("rgb")

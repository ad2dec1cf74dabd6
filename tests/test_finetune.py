"""Fine-tuning on a run, its test, its export; and the protocols on the same run."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import runs
import torch

from cascade_engine.deployment.artefact import load, save
from cascade_engine.deployment.assemble import assemble
from cascade_engine.deployment.finetune import finetune
from cascade_engine.deployment.finetuned import FinetuneConfig, FineTuned
from cascade_engine.deployment.judging import LabelledWindows, judge, require_judgeable
from cascade_engine.deployment.predict import predict
from cascade_engine.errors import CascadeError, CheckpointError, InvalidInput
from cascade_engine.store import FeatureStore
from cascade_engine.training.run import Run
from cascade_engine.training.settings import to_toml
from cascade_engine.video.index import VideoIndex


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.make(tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def tuned(run):
    return finetune(run, FinetuneConfig(view="rgb", epochs=30, batch=8))


def test_colours_are_learnt(tuned):
    assert tuned.labels == ("blue", "green", "red")
    assert [row["epoch"] for row in tuned.curve] == list(range(1, 31))
    assert tuned.curve[-1]["loss"] < tuned.curve[0]["loss"]
    scores = judge([tuned])
    assert scores.confusion.sum() == 6
    assert scores.figures["accuracy"] > 0.6  # chance is a third


def test_it_learns_the_same_bits_twice_and_leaves_the_global_generator_alone(run):
    config = FinetuneConfig(view="residual", epochs=2, batch=8)
    before = torch.random.get_rng_state()
    one, two = finetune(run, config), finetune(run, config)
    assert torch.equal(before, torch.random.get_rng_state())
    assert one.curve == two.curve
    for name, value in one.stream.state_dict().items():
        assert torch.equal(value, two.stream.state_dict()[name])


def test_the_head_alone_leaves_the_encoder_as_it_was(run):
    tuned = finetune(run, FinetuneConfig(view="rgb", layers="head", epochs=1, batch=8))
    trained = run.encoder("rgb").backbone.state_dict()
    for name, value in tuned.stream.backbone.state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_test_videos_are_never_read_while_learning(run, monkeypatch):
    windows = LabelledWindows.of(run, "train")
    test_rows = set(windows.table.row[windows.rows("test")].tolist())
    asked = set()
    frames = type(windows.cache).frames

    def noted(self, view, row, start=0, length=None):
        asked.add(row)
        return frames(self, view, row, start, length)

    monkeypatch.setattr(type(windows.cache), "frames", noted)
    finetune(run, FinetuneConfig(view="rgb", layers="head", epochs=1, batch=8))
    assert asked
    assert not asked & test_rows


def test_what_is_saved_is_what_was_learnt(tuned, tmp_path):
    tuned.save(tmp_path)
    again = FineTuned.open(tmp_path)
    assert again.labels == tuned.labels
    assert again.config == tuned.config
    assert again.curve == tuned.curve
    assert judge([again]).to_json() == judge([tuned]).to_json()
    with pytest.raises(CheckpointError, match="no such file"):
        FineTuned.open(tmp_path / "nowhere")


def test_two_streams_are_averaged(run, tuned):
    other = finetune(run, FinetuneConfig(view="residual", layers="head", epochs=1, batch=8))
    joint = judge([tuned, other], crops=2)
    windows = LabelledWindows.of(run, "train")
    rows = windows.rows("test")
    means = [windows.per_video(member.classifier(2), rows) for member in (tuned, other)]
    mean = (means[0][0] + means[1][0]) / 2
    assert joint.figures["accuracy"] == (mean.argmax(1) == means[0][1]).mean()
    assert joint.settings["crops"] == 2
    assert len(joint.settings["members"]) == 2


def test_a_test_takes_the_crops_that_its_config_asks_for(tuned):
    wanted = replace(tuned, config=replace(tuned.config, crops=10))
    assert judge([wanted]).to_json() == judge([tuned], crops=10).to_json()
    assert judge([wanted]).settings["crops"] == 10
    assert judge([wanted], crops=2).settings["crops"] == 2
    assert judge([tuned, wanted]).settings["crops"] == 1


@pytest.mark.filterwarnings("error:No complete tensor")
def test_the_exported_two_stream_model_labels_the_files_as_the_live_one_does(run, tuned, tmp_path):
    """From files through decoding, views and the graph, against the cache and the live modules."""
    other = finetune(run, FinetuneConfig(view="residual", layers="head", epochs=1, batch=8))
    tuned.save(tmp_path / "a")
    other.save(tmp_path / "b")
    classifier, signature = assemble([tmp_path / "a", tmp_path / "b"])
    model = load(save(classifier, signature, tmp_path / "model.pt2"))
    assert model.signature.labels == tuned.labels
    assert [view.name for view in model.signature.views] == ["rgb", "residual"]
    windows = LabelledWindows.of(run, "train")
    rows = windows.rows("test")
    means, _, ids = windows.per_video(classifier, rows)
    results = list(predict(model, [run.index[int(video)].path for video in ids]))
    for mean, result in zip(means, results, strict=True):
        assert result.problem is None
        assert np.abs(result.probabilities - mean).max() < 1e-4
        assert result.best()[0][0] == tuned.labels[int(mean.argmax())]


def test_a_run_alone_is_exported_for_its_features(run):
    classifier, signature = assemble([run.folder], views=["rgb"], features="projection")
    assert signature.labels == ()
    assert signature.views[0].dim == run.config.model.dim
    windows = LabelledWindows.of(run, "train")
    pixels = windows.pixels("rgb", [0, 1])
    with torch.no_grad():
        (found,) = classifier(pixels)
    with FeatureStore.open(run.store_path, phase="first") as store:
        assert np.abs(found.numpy() - store.features("rgb")[:2]).max() < 1e-5


def test_members_must_be_of_the_same_videos(run, tuned, tmp_path):
    """Numbered alike and labelled alike, they would be averaged with other videos' probabilities."""
    entries = [replace(each, path=each.path.with_name("other.mp4")) for each in run.index]
    elsewhere = replace(tuned, run=Run(shutil.copytree(run.folder, tmp_path / "other"), run.config))
    VideoIndex(entries).to_csv(elsewhere.run.index_path)
    for asked in (lambda: judge([tuned, elsewhere]), lambda: require_judgeable(run, tuned.config, [elsewhere])):
        with pytest.raises(InvalidInput, match=r"with: expected the videos of .*other\.mp4"):
            asked()


def test_what_the_test_would_refuse_is_refused_before_training(run, tuned):
    require_judgeable(run, replace(tuned.config, crops=10), [tuned])
    narrow = Run(run.folder, replace(run.config, clip=replace(run.config.clip, size=40)))
    for judged, config, members, message in [
        (run, replace(tuned.config, test_split="nowhere"), [], "labelled windows in 'nowhere'"),
        (narrow, replace(tuned.config, crops=5), [], "frames larger than 40 to cut corners"),
        (run, replace(tuned.config, crops=5), [replace(tuned, run=narrow)], "frames larger than 40 to cut corners"),
        (run, tuned.config, [replace(tuned, labels=("blue", "green"))], "expected the labels of"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            require_judgeable(judged, config, members)


def test_a_classifier_stays_what_it_was_when_its_run_goes_on_or_is_made_anew(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    more = replace(run.config, phase=(*run.config.phase, replace(run.config.phase[0], name="second")))
    (folder / "config.toml").write_text(to_toml(more))
    begun = Run.open(folder)
    finetune(begun, FinetuneConfig(view="rgb", layers="head", epochs=1)).save(tmp_path / "tuned")
    _, signature = assemble([tmp_path / "tuned"])
    assert signature.source == {"rgb": "run, phase first, fine-tuned"}
    begun.save_encoders("second", {"rgb": begun.encoder("rgb")})
    anew = replace(more, clip=replace(more.clip, frames=6, stride=1), model=replace(more.model, dim=16))
    (folder / "config.toml").write_text(to_toml(anew))
    assert assemble([tmp_path / "tuned"])[1] == signature
    shutil.rmtree(folder)
    assert assemble([tmp_path / "tuned"])[1] == signature


def test_what_diverges_is_not_kept(run):
    """One step spoils the weights after its loss was still finite: the probabilities tell."""
    for batch in (4, 32):
        with pytest.raises(CascadeError, match="diverged in epoch 1"):
            finetune(run, FinetuneConfig(view="rgb", epochs=1, batch=batch, lr=1e30))


def test_what_does_not_fit_together_is_refused(run, tuned, tmp_path):
    tuned.save(tmp_path / "a")
    with pytest.raises(InvalidInput, match="another view than 'rgb'"):
        assemble([tmp_path / "a", tmp_path / "a"])
    with pytest.raises(InvalidInput, match="fine-tuned classifiers"):
        assemble([tmp_path / "a", run.folder])
    with pytest.raises(InvalidInput, match="leaves the projection behind"):
        assemble([tmp_path / "a"], features="projection")
    with pytest.raises(InvalidInput, match="with a run alone"):
        assemble([tmp_path / "a"], phase="first")
    with pytest.raises(InvalidInput, match="two or more labels in 'nowhere'"):
        finetune(run, FinetuneConfig(view="rgb", train_split="nowhere"))
    with pytest.raises(InvalidInput, match=r"the area within \(0, 1\]"):
        finetune(run, FinetuneConfig(view="rgb", area=0.0, epochs=1))
    with pytest.raises(InvalidInput, match=r"the area within \(0, 1\]"):
        finetune(run, FinetuneConfig(view="rgb", area=float("nan"), epochs=1))
    for wrong in ({"epochs": 0}, {"lr": float("inf")}, {"lr": float("nan")}, {"weight_decay": float("nan")}):
        with pytest.raises(InvalidInput, match="epochs and batch of at least 1, a finite lr"):
            FinetuneConfig(view="rgb", **wrong)
    with pytest.raises(InvalidInput, match="seed: expected a number from 0"):
        FinetuneConfig(view="rgb", seed=-1)
    with pytest.raises(InvalidInput, match="crops: expected one of 1, 2, 5, 10, got 3"):
        FinetuneConfig(view="rgb", crops=3)
    with pytest.raises(InvalidInput, match="expected a run's folder"):
        assemble([tmp_path])

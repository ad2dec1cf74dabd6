"""The exported file: the same answers as the live model, anywhere, and a clear word where it cannot be read."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import deployed
import numpy as np
import pytest
import torch

from cascade_engine.deployment.artefact import FORMAT, Model, Signature, load, save
from cascade_engine.deployment.classifier import Classifier, Stream
from cascade_engine.errors import CheckpointError, InvalidInput
from cascade_engine.models.encoder import build_encoder

FRESH = """
import sys
import numpy as np
from cascade_engine.deployment.artefact import load
model = load(sys.argv[1])
clips = np.load(sys.argv[2])
found = model.run({view: clips[view] for view in clips.files})
np.savez(sys.argv[3], probabilities=found.probabilities, **found.features)
print([name for name in sys.modules if name.startswith(("cascade_engine.training", "cascade_engine.models"))])
"""


@pytest.fixture(scope="module")
def live():
    return deployed.classifier(crops=2)


@pytest.fixture(scope="module", params=["pt2", "onnx"])
def exported(live, request, tmp_path_factory):
    if request.param == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    return save(live, deployed.signature(live), tmp_path_factory.mktemp("model") / f"model.{request.param}")


def test_a_fresh_process_gives_the_live_model_s_labels_and_scores(live, exported, tmp_path):
    clips = {view: deployed.pixels(view, 50, seed=7) for view in live.views}
    np.savez(tmp_path / "clips.npz", **{view: each.numpy() for view, each in clips.items()})
    command = [sys.executable, "-c", FRESH, str(exported), str(tmp_path / "clips.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"  # neither trainer nor config nor model code was imported
    found = np.load(tmp_path / "out.npz")
    with torch.no_grad():
        probabilities, *features = (each.numpy() for each in live(*clips.values()))
    assert found["probabilities"].argmax(1).tolist() == probabilities.argmax(1).tolist()
    assert len(set(probabilities.argmax(1).tolist())) > 1
    assert np.abs(found["probabilities"] - probabilities).max() < 1e-4
    for view, expected in zip(live.views, features, strict=True):
        assert np.abs(found[view] - expected).max() < 1e-4
        assert np.allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)


def test_any_batch_size_runs_and_changes_nothing(exported):
    model = load(exported)
    clips = {view: deployed.pixels(view, 5).numpy() for view in ("rgb", "residual")}
    whole = model.run(clips)
    for row in range(5):
        alone = model.run({view: each[row : row + 1] for view, each in clips.items()})
        assert np.abs(alone.probabilities - whole.probabilities[row]).max() < 1e-5


def test_more_clips_than_a_graph_takes_at_once_are_given_to_it_in_turn(live, monkeypatch):
    clips = {view: deployed.pixels(view, 5).numpy() for view in live.views}
    program = deployed.Live(live)
    model = Model(Path("live.pt2"), deployed.signature(live), program)
    whole = model.run(clips)
    monkeypatch.setattr("cascade_engine.deployment.artefact.MAX_BATCH", 2)
    split = model.run(clips)
    assert program.batches == [5, 2, 2, 1]
    assert np.abs(split.probabilities - whole.probabilities).max() < 1e-5
    assert all(np.abs(split.features[view] - whole.features[view]).max() < 1e-5 for view in live.views)
    with pytest.raises(InvalidInput, match=r"as many clips in every view, got \[5, 4\]"):
        model.run({**clips, "residual": clips["residual"][:4]})


def test_the_file_says_what_it_takes(live, exported):
    described = load(exported).signature
    assert described.labels == deployed.LABELS
    assert [view.name for view in described.views] == ["rgb", "residual"]
    assert (described.frames, described.stride, described.size, described.span) == (4, 2, 36, 7)
    assert described.torch == torch.__version__
    assert described.source == {"run": "a test"}


def test_pixels_of_another_kind_are_refused(exported):
    model = load(exported)
    good = {view: deployed.pixels(view, 1).numpy() for view in ("rgb", "residual")}
    with pytest.raises(InvalidInput, match="expected the view 'residual', got rgb"):
        model.run({"rgb": good["rgb"]})
    with pytest.raises(InvalidInput, match=r'pixels\["rgb"\]: expected \(B, 4, 36, 36, 3\) uint8, got .* float32'):
        model.run({**good, "rgb": good["rgb"].astype(np.float32)})
    with pytest.raises(InvalidInput, match=r"got \(1, 3, 36, 36, 3\) uint8"):
        model.run({**good, "rgb": good["rgb"][:, :3]})


def test_a_newer_format_says_who_wrote_it(exported, tmp_path):
    text = Signature.to_json(load(exported).signature)
    newer = json.dumps({**json.loads(text), "format": FORMAT + 1, "engine": "9.9.0", "surprise": 1})
    target = tmp_path / exported.name
    if exported.suffix == ".pt2":
        with zipfile.ZipFile(exported) as old, zipfile.ZipFile(target, "w") as new:
            for entry in old.infolist():
                data = old.read(entry)
                new.writestr(entry, newer if entry.filename.endswith("cascade.json") else data)
    else:
        import onnx

        graph = onnx.load(exported)
        graph.metadata_props[0].value = newer
        onnx.save(graph, target)
    with pytest.raises(
        CheckpointError, match=r"written by cascade_engine 9\.9\.0 in format 2; this is .* reads format 1"
    ):
        load(target)


def test_damaged_and_foreign_files_are_refused_by_name(exported, tmp_path):
    whole = exported.read_bytes()
    cases = {
        "missing": (None, "no such file"),
        "empty": (b"", "not a readable|cannot load"),
        "cut": (whole[: len(whole) // 2], "not a readable|cannot load"),
        "foreign": (b"hello " * 100, "not a readable|cannot load"),
    }
    for name, (data, message) in cases.items():
        path = tmp_path / f"{name}{exported.suffix}"
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message) as caught:
            load(path)
        assert str(path) in str(caught.value)
    other = tmp_path / "model.bin"
    other.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"expected a \.pt2 or \.onnx file"):
        load(other)


def test_nothing_is_left_where_an_export_fails(live, tmp_path):
    with pytest.raises(InvalidInput, match=r"ends in \.pt2 or \.onnx"):
        save(live, deployed.signature(live), tmp_path / "model.zip")
    assert list(tmp_path.iterdir()) == []


def test_two_streams_are_the_mean_of_their_probabilities():
    both = deployed.classifier(("rgb", "flow"))
    clips = {view: deployed.pixels(view, 3) for view in both.views}
    with torch.no_grad():
        joint = both(*clips.values())[0]
        parts = [
            Classifier({view: both.streams[view]}, side=deployed.SIDE).eval()(clips[view])[0] for view in both.views
        ]
    assert torch.equal(joint, torch.stack(parts).mean(0))


def test_ten_crops_are_the_whole_the_corners_and_their_mirror_images():
    ten, one = deployed.classifier(("rgb",), crops=10), deployed.classifier(("rgb",))
    clips = deployed.pixels("rgb", 2)
    high = deployed.SIZE - deployed.SIDE
    parts = []
    with torch.no_grad():
        for place in (None, (0, 0), (0, high), (high, 0), (high, high)):
            top, left = place or (0, 0)
            side = deployed.SIDE if place else deployed.SIZE
            cut = clips[:, :, top : top + side, left : left + side]
            parts += [one(cut)[0], one(cut.flip(3))[0]]
        found = ten(clips)[0]
    assert torch.allclose(found, torch.stack(parts).mean(0), atol=1e-6)
    assert not torch.allclose(found, parts[0], atol=1e-4)


def test_flow_turns_with_its_mirror_image_and_grows_with_its_corner():
    ten = deployed.classifier(("flow",), crops=10)
    clips = torch.zeros(1, deployed.FRAMES, deployed.SIZE, deployed.SIZE, 2, dtype=torch.int8)
    clips[..., 0] = 64
    whole, mirrored, corner, both = (ten.prepare("flow", clips, number) for number in (0, 1, 2, 3))
    grown = deployed.SIZE / deployed.SIDE
    for crop, sign, scale in ((whole, 1, 1), (mirrored, -1, 1), (corner, 1, grown), (both, -1, grown)):
        assert crop.shape == (1, 2, deployed.FRAMES, deployed.SIDE, deployed.SIDE)
        assert torch.allclose(crop[:, 0], torch.tensor(sign * scale * 64 / 127), atol=1e-6)
        assert not crop[:, 1].any()


def test_a_model_without_labels_gives_the_projection_that_mining_compares():
    torch.manual_seed(0)
    encoder = build_encoder("r3d_small", 3).eval()
    made = Classifier({"rgb": Stream(encoder, 0, "projection")}, side=deployed.SIDE).eval()
    clips = deployed.pixels("rgb", 2)
    with torch.no_grad():
        (features,) = made(clips)
        expected = encoder(made.prepare("rgb", clips))
    assert torch.allclose(features, expected, atol=1e-6)


def test_streams_that_do_not_fit_are_refused():
    stream = Stream(build_encoder("r3d_small", 3), 2)
    with pytest.raises(InvalidInput, match="streams: expected views among"):
        Classifier({"sound": stream}, side=32)
    with pytest.raises(InvalidInput, match="as many classes in each"):
        Classifier({"rgb": stream, "residual": Stream(build_encoder("r3d_small", 3), 3)}, side=32)
    with pytest.raises(InvalidInput, match="crops: expected one of 1, 2, 5, 10, got 3"):
        Classifier({"rgb": stream}, side=32, crops=3)
    small = Classifier({"rgb": stream}, side=deployed.SIZE, crops=5)
    with pytest.raises(InvalidInput, match=r"expected frames larger than 36 to cut corners, got 36 x 36"):
        small(deployed.pixels("rgb", 1))

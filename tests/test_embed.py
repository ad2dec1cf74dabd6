"""Features of videos in a store and the way back: which video comes first for a part of it, re-encoded."""

import json
import os
import shutil
from pathlib import Path

import deployed
import films
import numpy as np
import pytest
from cascade_engine.cli.main import main
from click.testing import CliRunner

from cascade_engine.deployment.artefact import Model, save
from cascade_engine.deployment.embed import default_plan, embed, open_store, query, video_id_of
from cascade_engine.deployment.predict import predict
from cascade_engine.errors import InvalidInput, SchemaMismatch, VideoError
from cascade_engine.plan import CascadePlan
from cascade_engine.store import FeatureStore


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = deployed.classifier(labels=())
    file = tmp_path_factory.mktemp("model") / "live.pt2"
    file.write_bytes(b"a file to take the fingerprint of")
    return Model(file, deployed.signature(made, labels=()), deployed.Live(made))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for seed in range(4):
        films.write(root / f"{seed}.mp4", films.moving(40, step=(1, 0), seed=seed))
    return root


@pytest.fixture(scope="module")
def filled(model, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "clips.zarr"
    with open_store(path, model) as store:
        told = embed(model, [*sorted(folder.glob("*.mp4")), folder / "gone.mp4"], store)
    assert sorted(each.problem is None for each in told) == [False, True, True, True, True]
    return path


def test_a_row_for_each_window_holds_what_the_model_says(model, folder, filled):
    results = list(predict(model, sorted(folder.glob("*.mp4"))))
    with FeatureStore.open(filled) as store:
        assert store.views == {"rgb_backbone": 64, "residual_backbone": 64}
        assert store.rows == sum(len(each.windows) for each in results)
        for view in ("rgb", "residual"):
            expected = np.concatenate([[window.features[view] for window in each.windows] for each in results])
            assert np.abs(store.features(f"{view}_backbone") - expected).max() < 1e-5
        paths = [str(each.path) for each in results for _ in each.windows]
        assert store.column("path").tolist() == paths
        assert store.column("start").tolist() == [window.start for each in results for window in each.windows]
        assert len(set(store.column("video_id").tolist())) == 4


def test_a_part_of_a_video_re_encoded_finds_it(model, folder, filled, tmp_path):
    part = films.write(tmp_path / "part.mkv", films.moving(40, step=(1, 0), seed=2)[13:24], options={"crf": "30"})
    with FeatureStore.open(filled) as store:
        hits = query(model, store, part, k=5)
        assert Path(hits[0].path) == folder / "2.mp4"
        assert [hit.similarity for hit in hits] == sorted((hit.similarity for hit in hits), reverse=True)
        assert len({hit.clip_id for hit in hits}) == 5
        staged = query(model, store, part, k=1, plan=CascadePlan.parse("residual_backbone:50%,rgb_backbone:1"))
        assert Path(staged[0].path) == folder / "2.mp4"


def test_a_video_may_be_told_not_to_find_itself(model, folder, filled, tmp_path):
    copy = tmp_path / "copy.mp4"
    copy.write_bytes((folder / "1.mp4").read_bytes())
    with FeatureStore.open(filled) as store:
        assert {hit.video_id for hit in query(model, store, copy, k=3)} == {video_id_of(folder / "1.mp4")}
        others = query(model, store, copy, k=3, others=True)
        assert len(others) == 3
        assert video_id_of(folder / "1.mp4") not in {hit.video_id for hit in others}
        early = query(model, store, copy, k=3, where="start < 0.2")
        assert all(hit.start < 0.2 for hit in early)


def test_the_nearest_is_the_nearest_of_all_windows(model, folder, filled):
    with FeatureStore.open(filled) as store:
        hits = query(model, store, folder / "0.mp4", k=4, others=True)
        result = next(predict(model, [folder / "0.mp4"]))
        keys = {view: store.features(view).astype(np.float64) for view in ("rgb_backbone", "residual_backbone")}
        scores = sum(
            np.stack([window.features[view] for window in result.windows]).astype(np.float64)
            @ keys[f"{view}_backbone"].T
            for view in ("rgb", "residual")
        )
        scores[:, store.column("video_id") == video_id_of(folder / "0.mp4")] = -np.inf
        best = scores.max(0)
        expected = store.column("clip_id")[np.argsort(-best, kind="stable")[:4]]
        assert [hit.clip_id for hit in hits] == expected.tolist()
        assert [hit.similarity for hit in hits] == pytest.approx(np.sort(best)[::-1][:4], abs=1e-5)


def test_embedding_again_adds_what_is_new(model, folder, filled, tmp_path):
    more = films.write(tmp_path / "more.mp4", films.moving(12, seed=9))
    with open_store(filled, model) as store:
        before = store.rows
        told = embed(model, [folder / "0.mp4", more], store)
        assert [each.clips for each in told if each.path == more] == [3]
        assert [each.clips for each in told if each.path != more] == [0]
        assert all(each.problem is None for each in told)
        assert store.rows == before + 3


def test_features_of_two_models_never_meet(model, filled, folder, tmp_path):
    other_file = tmp_path / "other.pt2"
    other_file.write_bytes(b"another")
    other = Model(other_file, model.signature, model._program)
    with pytest.raises(SchemaMismatch, match="holds features of the model"):
        open_store(filled, other).__enter__()
    with FeatureStore.open(filled) as store, pytest.raises(SchemaMismatch, match="another phase"):
        query(other, store, folder / "0.mp4")
    with open_store(filled, other, phase="second") as store:
        embed(other, [folder / "0.mp4"], store)
        assert store.phases == ("main", "second")
    with open_store(filled, model):
        pass  # the refused writer left no lock


def test_a_store_or_phase_into_which_no_clip_got_is_not_kept(model, filled, tmp_path):
    """It would be bound to the model for nothing."""
    phases = FeatureStore.open(filled).phases
    for path, phase in ((tmp_path / "new.zarr", "main"), (filled, "typo")):
        with open_store(path, model, phase=phase) as store:
            assert [each.clips for each in embed(model, [tmp_path / "gone.mp4"], store)] == [0]
    assert list(tmp_path.iterdir()) == []
    assert FeatureStore.open(filled).phases == phases


def test_what_another_writer_put_into_an_empty_store_is_kept(model, folder, tmp_path):
    path = tmp_path / "s.zarr"
    with open_store(path, model), open_store(path, model, phase="theirs") as store:
        embed(model, [folder / "0.mp4"], store)
    assert FeatureStore.open(path, phase="theirs").rows > 0
    other = open_store(tmp_path / "t.zarr", model)
    mine = other.__enter__()
    mine.close()
    with open_store(tmp_path / "t.zarr", model) as store:
        other.__exit__(None, None, None)  # while theirs is locked
        embed(model, [folder / "0.mp4"], store)
    assert FeatureStore.open(tmp_path / "t.zarr").rows > 0


def test_a_copy_of_a_bad_file_is_as_bad(model, folder, tmp_path):
    for name in ("1.mp4", "2.mp4"):
        (tmp_path / name).write_text("nothing")
    good = shutil.copy(folder / "0.mp4", tmp_path / "3.mp4")
    with open_store(tmp_path / "s.zarr", model) as store:
        told = {each.path: each for each in embed(model, [*sorted(tmp_path.glob("*.mp4")), folder / "0.mp4"], store)}
    assert told[tmp_path / "1.mp4"].problem.startswith(f"{tmp_path / '1.mp4'}: not a readable video")
    assert told[tmp_path / "2.mp4"].problem.startswith(f"{tmp_path / '2.mp4'}: a copy of {tmp_path / '1.mp4'}: not a")
    assert told[good].clips > 0
    assert (told[folder / "0.mp4"].clips, told[folder / "0.mp4"].problem) == (0, None)


def test_a_name_that_is_no_unicode_is_embedded_all_the_same(model, folder, tmp_path):
    odd = tmp_path / os.fsdecode(b"n\xff.mp4")
    shutil.copy(folder / "0.mp4", odd)
    with open_store(tmp_path / "s.zarr", model) as store:
        embed(model, [odd, folder / "1.mp4"], store)
        assert {Path(each).name for each in store.column("path")} == {"n\ufffd.mp4", "1.mp4"}
        with pytest.raises(InvalidInput, match="path: expected Unicode texts"):
            store.append({}, clip_id=[99], video_id=1, start=0.0, end=1.0, path="\udcff")


def test_bad_queries_are_refused(model, filled, tmp_path):
    with FeatureStore.open(filled) as store:
        with pytest.raises(VideoError, match="no such file"):
            query(model, store, tmp_path / "gone.mp4")
        with pytest.raises(InvalidInput, match="k: expected at least 1"):
            query(model, store, tmp_path / "gone.mp4", k=0)
    assert str(default_plan(model, 3)) == "sum(rgb_backbone,residual_backbone):3"


def test_the_commands(folder, tmp_path):
    made = deployed.classifier(("rgb",), labels=())
    file = save(made, deployed.signature(made, labels=()), tmp_path / "features.pt2")
    (tmp_path / "broken.mp4").write_text("nothing")

    def cascade(*arguments):
        done = CliRunner().invoke(main, [str(each) for each in arguments], standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        return done.return_value or 0, done.stdout, done.stderr

    store = tmp_path / "s.zarr"
    code, out, err = cascade("embed", folder, tmp_path / "broken.mp4", "--model", file, "--store", store)
    assert code == 1
    assert "4 videos added" in out
    assert "broken.mp4: not a readable video" in err
    code, out, _ = cascade("embed", folder, "--model", file, "--store", store)
    assert (code, "4 videos were there already" in out) == (0, True)
    code, out, _ = cascade("query", store, "--video", folder / "3.mp4", "--model", file, "-k", 2, "--json")
    assert code == 0
    assert [Path(hit["path"]).name for hit in json.loads(out)] == ["3.mp4"] * 2
    with pytest.raises(InvalidInput, match="features alone"):
        cascade("classify", folder, "--model", file)

"""The commands around an exported model, as people call them: output, exit codes, one bad file among good ones."""

import json

import deployed
import films
import pytest
from cascade_engine.cli.main import main
from click.testing import CliRunner

from cascade_engine.deployment.artefact import load, save
from cascade_engine.deployment.predict import predict


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    made = deployed.classifier(("rgb", "flow"))
    return save(made, deployed.signature(made), tmp_path_factory.mktemp("model") / "model.pt2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    films.write(root / "a.mp4", films.moving(20))
    films.write(root / "b.mp4", films.moving(31, seed=1))
    return root


def cascade(*arguments):
    """The command's exit code, standard output and standard error."""
    done = CliRunner().invoke(main, [str(each) for each in arguments], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.return_value or 0, done.stdout, done.stderr


def test_a_folder_is_labelled_by_the_exported_model_with_flow_made_on_the_fly(exported, folder):
    code, out, _ = cascade("classify", folder, "--model", exported, "--top", 2, "--json", "--timeline")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    expected = [
        each.to_json(top=2, timeline=True) for each in predict(load(exported), [folder / "a.mp4", folder / "b.mp4"])
    ]
    assert rows == expected
    assert len(rows[0]["timeline"]) == rows[0]["windows"] > 1


def test_bad_files_are_told_the_others_labelled_and_the_exit_code_says_so(exported, folder, tmp_path):
    (tmp_path / "broken.mp4").write_text("nothing")
    code, out, err = cascade(
        "classify", tmp_path / "broken.mp4", folder / "a.mp4", tmp_path / "gone.mp4", "--model", exported
    )
    assert code == 1
    assert out.startswith(str(folder / "a.mp4"))
    assert len(out.splitlines()) == 1
    assert f"error: {tmp_path / 'broken.mp4'}: not a readable video" in err
    assert f"error: {tmp_path / 'gone.mp4'}: no such file" in err
    assert "2 of 3 videos had problems" in err


def test_what_is_wrong_with_a_video_is_told_once(exported, tmp_path, caplog):
    whole = films.write(tmp_path / "whole.mkv", films.moving(60)).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: int(len(whole) * 0.6)])
    code, out, err = cascade("classify", tmp_path / "cut.mkv", "--model", exported)
    assert code == 1
    assert out.startswith(str(tmp_path / "cut.mkv"))
    assert err.count("cut.mkv: ") == 1
    assert caplog.messages == []

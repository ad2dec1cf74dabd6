"""The video benchmark: flow is judged against motion that is known before it is timed."""

import json

import films
import numpy as np
import pytest
from cascade_engine.benchmarks.video import measure, moved_pair, table
from cascade_engine.cli.main import main
from click.testing import CliRunner

from cascade_engine.errors import InvalidInput


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return films.write(tmp_path_factory.mktemp("film") / "film.mp4", films.moving(6, 128, 128, (2, 1)))


def test_the_truth_is_true():
    texture = np.repeat(films.texture(256, 256)[..., None], 3, axis=-1)
    frames, ways = moved_pair(texture, 128, (3.0, -2.0, 0.0))
    np.testing.assert_allclose(ways, np.broadcast_to([3.0, -2.0], ways.shape), atol=1e-9)
    before, after = frames.rgb.astype(int)
    # What was at (y, x) is at (y - 2, x + 3).
    assert np.abs(after[20:-20, 23:-17] - before[22:-18, 20:-20]).mean() < 1
    assert np.abs(after[20:-20, 20:-20] - before[20:-20, 20:-20]).mean() > 3
    _, turned = moved_pair(texture, 64, (0.0, 0.0, 10.0))
    assert turned[0, 32, 0] < 0 < turned[63, 32, 0], "counter-clockwise: the top goes left"


def test_rates_and_errors_are_measured(film):
    rates = measure([film], sizes=(56,), rounds=1)
    assert all(rate.frames_per_second > 0 for rate in rates)
    errors = {rate.what: rate.error for rate in rates if rate.error is not None}
    assert {"flow dis", "flow farneback"} <= set(errors)
    assert all(0 < error < 0.5 for error in errors.values())
    assert table(rates).count("\n") == len(rates) + 1


def test_no_video_is_refused():
    with pytest.raises(InvalidInput, match="expected at least one"):
        measure([])


def test_the_command_prints_json(film):
    done = CliRunner().invoke(main, ["bench", "video", str(film), "--size", "56", "--rounds", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert {row["what"] for row in json.loads(done.output)} >= {"decode to rgb", "flow dis"}

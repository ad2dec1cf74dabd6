"""`cascade bench store` runs, compares answers and reports every format that is installed."""

import json

import pytest
from cascade_engine.benchmarks import store_large
from cascade_engine.cli.bench_store import command
from click.testing import CliRunner

pytest.importorskip("h5py")


def test_a_small_run_reports_readers_and_appends(tmp_path):
    arguments = ["--rows", "40000", "--dim", "8", "--rounds", "1", "--seconds", "0.01", "--folder", str(tmp_path)]
    done = CliRunner().invoke(command, [*arguments, "--json", str(tmp_path / "x.json")])
    assert done.exit_code == 0, done.exception
    found = json.loads((tmp_path / "x.json").read_text())
    assert {"np.memmap", "ours", "zarr", "h5py"} <= {each["name"] for each in found["reading"]}
    appended = [(each["name"], each["batch"]) for each in found["appending"]]
    for name in ("ours, commit", "ours, group", "ours, none", "zarr", "h5py + flush"):
        assert [batch for each, batch in appended if each == name] == [256, 4096, 65536]
    assert "survives power loss" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"], "nothing is left behind"


def test_a_large_store_is_mined_from_what_is_kept(tmp_path):
    """Small here; `large` itself compares the answers with float64 and between the two processes."""
    found = CliRunner().invoke(command, ["--large", "3000", "--dim", "16", "--folder", str(tmp_path)])
    assert found.exit_code == 0, found.exception
    assert "3,000 x 16 float16" in found.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_ten_million_clips_are_mined_in_little_memory(tmp_path):
    pytest.importorskip("cascade_engine._cpu")
    for use in store_large.large(tmp_path, 10_000_000, 128, lambda _: None):
        assert use.peak < 1500
        assert use.kept > 1000
        assert use.open < 0.5

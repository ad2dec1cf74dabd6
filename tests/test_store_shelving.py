"""What mining prepares of a phase, kept beside it on disk: the same answers, reused, and never trusted when damaged."""

import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import cascade_engine as ce
from cascade_engine.store.cleaning import clean

_cpu = pytest.importorskip("cascade_engine._cpu", reason="the wheel was built without a C++ compiler")
ISAS = [name for name, runs in _cpu.isas() if runs]
PLANS = ["rgb:10", "rgb:50%,flow:5", "sum(rgb,flow):200,rgb:7", "min(rgb,flow):9"]


@pytest.fixture
def path(tmp_path):
    """A store of 5,000 clips in several chunk files."""
    rng = np.random.default_rng(3)
    rgb, flow = rng.standard_normal((5000, 24)), rng.standard_normal((5000, 9))
    with ce.FeatureStore.create(
        tmp_path / "s", {"rgb": 24, "flow": 9}, dtype="float16", columns={"split": "str"}, chunk_bytes=1 << 15
    ) as store:
        for start in range(0, 5000, 1300):
            rows = np.arange(start, min(start + 1300, 5000))
            views = {"rgb": rgb[rows].astype(np.float16), "flow": flow[rows].astype(np.float16)}
            store.append(views, clip_id=rows, video_id=rows // 4, split=["a" if i % 3 else "b" for i in rows])
    return tmp_path / "s"


def files(path):
    return sorted((path / "phases/main/commits/aside").glob("*.packed*"))


def answers(path, metric="ip", *, keep, plans=PLANS, at=None):
    bank = ce.FeatureStore.open(path).bank(metric=metric, keep=keep, at=at)
    queries = {view: np.asarray(keys[100:140], np.float32) + 0.01 for view, keys in bank.keys.items()}
    found = [
        ce.mine(ce.CascadePlan.parse(plan), queries, bank, bank.video_id[100:140], backend="cpu") for plan in plans
    ]
    return [(each.index, each.similarity) for each in found]


def same(found, expected):
    return all(np.array_equal(a[i], b[i]) for a, b in zip(found, expected, strict=True) for i in (0, 1))


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("isa", ISAS)
def test_a_bank_kept_on_disk_answers_as_one_in_memory(path, metric, isa, monkeypatch, caplog):
    monkeypatch.setenv("CASCADE_ISA", isa)
    expected = answers(path, metric, keep=False)
    assert files(path) == []
    shutil.rmtree(path / "phases/main/commits/aside")  # as a copy without empty folders is
    assert same(answers(path, metric, keep=True), expected)
    made = {file: file.stat().st_mtime_ns for file in files(path)}
    assert made
    for other in ISAS:  # what one instruction set packed serves the others
        monkeypatch.setenv("CASCADE_ISA", other)
        assert same(answers(path, metric, keep=True), expected)
    assert {file: file.stat().st_mtime_ns for file in made} == made, "packed once"
    assert caplog.records == []


def test_answers_come_from_the_file(path):
    """A file that is trusted though it was made from other keys changes the answers: so it is read, not remade."""
    answers(path, keep=True, plans=["rgb:10"])
    kept, sources = files(path), answers(path, keep=False, plans=["rgb:10"])
    packed = {file: file.read_bytes() for file in kept}
    for chunk in sorted((path / "phases/main/rgb").glob("c.*")):
        data = np.fromfile(chunk, np.float16)
        chunk.write_bytes((-data).tobytes())
    assert not same(answers(path, keep=False, plans=["rgb:10"]), sources)
    assert not same(answers(path, keep=True, plans=["rgb:10"]), answers(path, keep=False, plans=["rgb:10"]))
    assert {file: file.read_bytes() for file in kept} == packed


@pytest.mark.parametrize("where", [0, 9, 30, 60, 100, 4095, 4096, 50_000, -1, "short", "empty"])
def test_a_damaged_file_is_refused_and_made_anew(path, where, caplog):
    expected = answers(path, keep=True, plans=["rgb:50%,flow:5"])
    file = next(each for each in files(path) if each.name.startswith("rgb."))
    whole = file.read_bytes()
    damaged = bytearray(whole)
    if where == "short":
        damaged = damaged[:-1]
    elif where == "empty":
        damaged = damaged[:0]
    else:
        damaged[where] ^= 4
    file.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert same(answers(path, keep=True, plans=["rgb:50%,flow:5"]), expected)
    assert file.read_bytes() == whole
    assert [file.name in record.message and "made anew" in record.message for record in caplog.records] == [True]


def test_a_file_of_another_phase_is_refused(path, tmp_path, caplog):
    expected = answers(path, keep=True)
    rng = np.random.default_rng(4)
    rows = np.arange(1250)
    with ce.FeatureStore.create(tmp_path / "t", {"rgb": 24, "flow": 9}, dtype="float16", columns={"split": "str"}) as t:
        for part in range(4):
            views = {view: rng.standard_normal((1250, dim)).astype(np.float16) for view, dim in t.views.items()}
            t.append(views, clip_id=rows + 1250 * part, video_id=rows, split="a")
    mine, theirs = answers(tmp_path / "t", keep=True), {each.name: each for each in files(tmp_path / "t")}
    assert [each.name for each in files(path)] == list(theirs), "the names alone do not tell"
    for file in files(path):
        file.write_bytes(theirs[file.name].read_bytes())
    assert same(answers(path, keep=True), expected)
    assert len(caplog.records) == len(theirs)
    assert same(answers(tmp_path / "t", keep=True), mine)


def test_a_commit_has_files_of_its_own_and_gc_removes_superseded_ones(path):
    answers(path, keep=True, plans=["rgb:10"])
    old = files(path)
    with ce.FeatureStore.open(path, mode="a") as store:
        at = store.commit
        views = {"rgb": np.ones((1, 24), np.float16), "flow": np.ones((1, 9), np.float16)}
        store.append(views, clip_id=[5000], video_id=[9999], split=["a"])
    before = answers(path, keep=False, plans=["rgb:10"], at=at)
    assert same(answers(path, keep=True, plans=["rgb:10"], at=at), before)
    assert files(path) == old, "an older commit finds its file"
    now = answers(path, keep=False, plans=["rgb:10"])
    assert same(answers(path, keep=True, plans=["rgb:10"]), now)
    new = sorted(set(files(path)) - set(old))
    assert len(new) == len(old) == 1
    broken_off = new[0].with_name(new[0].name + f".new-0-{2**22 + 1}")
    at_work = new[0].with_name(new[0].name + f".new-0-{os.getpid()}")
    for each in (broken_off, at_work):
        each.write_bytes(b"x")
    assert {each for each, _ in clean(path, dry_run=True)} == {*old, broken_off}
    clean(path)
    assert files(path) == sorted([*new, at_work])
    at_work.unlink()
    assert ce.FeatureStore.open(path).verify() == []


def test_where_the_disk_refuses_memory_serves_and_it_is_said(path, caplog):
    expected = answers(path, keep=False)
    aside = path / "phases/main/commits/aside"
    aside.rename(aside.with_name("elsewhere"))
    aside.touch()
    assert same(answers(path, keep=True), expected)
    assert caplog.records
    assert all("kept in memory" in record.message for record in caplog.records)


def test_filtered_banks_and_small_ones_stay_in_memory(path):
    bank = ce.FeatureStore.open(path).bank(where="split == 'a'", keep=True)
    assert bank.shelf is None
    assert ce.FeatureStore.open(path).bank().shelf is None
    assert ce.FeatureStore.open(path).bank(keep=True).shelf is not None
    assert ce.FeatureStore.open(path).bank(device="cpu", keep=True).shelf is not None


def test_a_large_array_is_gathered_in_pieces(path, monkeypatch):
    from cascade_engine.store import mapping

    monkeypatch.setattr(mapping, "_GATHERED", 5000)
    store = ce.FeatureStore.open(path)
    bank, rows = store.bank(where="split == 'a'"), store.matching("split == 'a'")
    for view, keys in bank.keys.items():
        assert np.array_equal(keys, np.array(store.features(view))[rows])


def test_several_processes_prepare_at_once(path):
    code = (
        "import sys, numpy as np, cascade_engine as ce\n"
        "bank = ce.FeatureStore.open(sys.argv[1]).bank(keep=True)\n"
        "found = ce.mine(ce.CascadePlan.parse('rgb:10'), {'rgb': bank.keys['rgb'][:40]}, bank, backend='cpu')\n"
        "print(found.index.tolist())"
    )
    work = [subprocess.Popen([sys.executable, "-P", "-c", code, path], stdout=subprocess.PIPE) for _ in range(3)]
    found = {each.communicate()[0] for each in work}
    assert [each.returncode for each in work] == [0, 0, 0]
    assert len(found) == 1
    assert len(files(path)) == 1

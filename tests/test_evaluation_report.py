"""The report's pieces: everything inside one file, everything escaped, the cascade as the engine traced it."""

import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

import cascade_engine as ce
from cascade_engine.errors import InvalidInput
from cascade_engine.evaluation.page import Section, curves, matrix, scatter, table, write_report
from cascade_engine.evaluation.report import cascade_strip, data_uri, project, trace_cascade

PLAN = ce.CascadePlan.parse("flow:50%,rgb:25%,flow:3")
VOID = {"meta", "img"}


class Balanced(HTMLParser):
    """Follows a page's tags: each that opens must close, in order; notes what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for key, value in attrs if key in ("src", "href") and not value.startswith("data:")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def bank_and_queries():
    rng = np.random.default_rng(0)
    keys = {view: rng.standard_normal((40, 8)).astype(np.float32) for view in ("rgb", "flow")}
    bank = ce.Bank(keys, np.arange(40) // 2, label=np.array([f"class {i % 4}" for i in range(40)]))
    return bank, keys


def test_a_trace_is_what_the_engine_kept(bank_and_queries):
    bank, queries = bank_and_queries
    rows = [3, 17]
    traces = trace_cascade(PLAN, queries, bank, bank.video_id, rows=rows, query_labels=bank.label)
    found = ce.mine(PLAN, {v: queries[v][rows] for v in queries}, bank, bank.video_id[rows])
    for position, trace in enumerate(traces):
        assert [len(stage.kept) for stage in trace.stages] == [20, 10, 3]
        assert trace.stages[-1].kept.tolist() == found.index[position].tolist()
        assert set(trace.stages[1].kept) <= set(trace.stages[0].kept)
        assert trace.candidates == 38
        for stage in trace.stages:
            assert stage.right.tolist() == [bank.label[j] == bank.label[trace.query] for j in stage.kept]
            assert stage.precision == np.mean(stage.right)


def test_without_labels_nothing_is_called_right(bank_and_queries):
    bank, queries = bank_and_queries
    trace = trace_cascade(PLAN, queries, bank, bank.video_id, rows=[0])[0]
    assert trace.base_rate is None
    assert all(stage.right is None and stage.precision is None for stage in trace.stages)


def test_a_query_without_a_label_has_nothing_right(bank_and_queries):
    bank, queries = bank_and_queries
    bank.label = np.where(np.arange(40) % 4 < 2, "", bank.label)
    unknown, known = trace_cascade(PLAN, queries, bank, bank.video_id, rows=[0, 2], query_labels=bank.label)
    assert unknown.base_rate is None
    assert all(stage.right is None for stage in unknown.stages)
    assert known.base_rate == (bank.label == "class 2")[bank.video_id != 1].mean()


def test_what_is_not_finite_interrupts_a_line():
    drawn = curves({"a": ([0, 1, 2, 3, 4], [1, float("nan"), 3, 2, float("inf")])}, x_label="x", y_label="y")
    assert [len(points.split()) for points in re.findall(r'<polyline points="([^"]*)"', drawn)] == [1, 2]
    assert drawn.count("<circle") == 2


def test_the_page_shows_the_cascade_and_fetches_nothing(bank_and_queries, tmp_path):
    bank, queries = bank_and_queries
    picture = np.full((48, 64, 3), 200, np.uint8)
    trace = trace_cascade(PLAN, queries, bank, bank.video_id, rows=[5], query_labels=bank.label)[0]
    strip = cascade_strip(
        trace,
        query_frames=[picture] * 3,
        query_name="<b>clip</b> & 'co'",
        thumbnail=lambda slot: picture,
        name=lambda slot: f"clip {slot} <{bank.label[slot]}>",
    )
    sections = [
        Section(title="Cascade", body=strip),
        Section(title="Loss", body=curves({"a<b": ([0, 1, 2], [3, float("nan"), 1])}, x_label="step", y_label="loss")),
        Section(title="Map", body=scatter(project(queries["rgb"]), bank.label.tolist(), x_label="1", y_label="2")),
        Section(title="Confusion", body=matrix([[3, 1], [0, 4]], ["a", "b"])),
        Section(title="Table", body=table([{"class": "<x>", "recall": 0.5}, {"class": "y", "recall": None}])),
    ]
    path = write_report(tmp_path / "report.html", "A <run>", sections)
    text = path.read_text()
    reader = Balanced()
    reader.feed(text)
    assert reader.open == []
    assert reader.fetched == []
    assert "<b>clip" not in text
    assert "<script" not in text
    assert text.count('<figure class="clip') == 3 + (10 + 1) + 10 + 3  # query, then per stage at most 10 and "more"
    right = sum(int(stage.right[:10].sum()) for stage in trace.stages)
    assert text.count('class="clip right"') == right
    assert text.count('class="clip wrong"') == 23 - right
    assert len(re.findall("nan", text)) == 0


def test_thumbnails_are_small_and_true():
    picture = np.zeros((120, 200, 3), np.uint8)
    picture[:, :, 0] = 250  # red in RGB
    uri = data_uri(picture)
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(uri.split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (48, 80, 3)
    assert decoded[20, 20, 2] > 240  # OpenCV's order is blue, green, red
    assert decoded[20, 20, 0] < 15
    with pytest.raises(InvalidInput, match=r"picture: expected \(H, W, 3\) uint8"):
        data_uri(np.zeros((4, 4, 3), np.float32))


def test_projection_finds_the_plane_the_data_lies_in():
    rng = np.random.default_rng(1)
    plane = rng.standard_normal((50, 2)) * [5, 2]
    basis = np.linalg.qr(rng.standard_normal((10, 2)))[0]
    shown = project(plane @ basis.T + 3)
    distances = np.linalg.norm(shown[:, None] - shown[None], axis=-1)
    assert np.allclose(distances, np.linalg.norm(plane[:, None] - plane[None], axis=-1))
    assert shown[:, 0].var() >= shown[:, 1].var()
    assert project(np.ones((4, 1), np.float32)).shape == (4, 2)


def test_an_empty_report_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="at least one"):
        write_report(tmp_path / "x.html", "x", [])

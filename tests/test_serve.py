"""The service: what it answers, what it refuses, and the page in a real browser."""

import base64
import re
import select
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path

import deployed
import films
import pytest
from cascade_engine.cli.main import main

pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")
pytest.importorskip("uvicorn")

from fastapi.testclient import TestClient

from cascade_engine.deployment.artefact import Model
from cascade_engine.deployment.predict import predict
from cascade_engine.deployment.serve import ServiceLimits, create_app
from cascade_engine.deployment.windows import Limits
from cascade_engine.errors import CascadeError, InvalidInput


@pytest.fixture(scope="module")
def model():
    made = deployed.classifier(("rgb",))
    return Model(Path("live.pt2"), deployed.signature(made), deployed.Live(made))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return films.write(tmp_path_factory.mktemp("upload") / "film.mp4", films.moving(30))


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary folders go, so that a test can see what is left there."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def client(model, scratch):
    limits = ServiceLimits(
        upload_bytes=200_000, video=Limits(seconds=3, frame_pixels=400_000, total_pixels=2e6), waiting=1
    )
    return TestClient(create_app(model, limits))


def test_a_posted_video_gets_the_labels_of_the_command(client, model, video):
    expected = next(predict(model, [video])).to_json(top=3, timeline=True)
    del expected["path"]
    body = client.post("/classify?top=3&timeline=true", content=video.read_bytes())
    assert body.status_code == 200
    assert body.json() == expected
    form = client.post("/classify?top=3&timeline=true", files={"video": ("film.mp4", video.read_bytes(), "video/mp4")})
    assert form.json() == expected


def test_a_port_that_is_taken_is_an_error_of_the_command(model, monkeypatch):
    """Not an exit by a code of uvicorn's own, which this command uses for something else."""
    monkeypatch.setattr("cascade_engine.deployment.artefact.load", lambda path: model)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CascadeError, match=f"cannot listen on 127.0.0.1:{port}"):
            main(["serve", "--model", "live.pt2", "--port", str(port)], standalone_mode=False)


def test_it_tells_that_it_lives_and_what_it_serves(client):
    assert client.get("/health").json()["status"] == "ok"
    assert client.get("/model").json()["labels"] == list(deployed.LABELS)
    assert set(client.get("/openapi.json").json()["paths"]) == {"/health", "/model", "/classify"}


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", 400, "empty body"),
        (b"hello " * 100, 422, "upload: not a readable video"),
        (b"x" * 200_001, 413, "at most 200000 bytes"),
    ],
)
def test_what_is_no_video_is_refused(client, scratch, content, status, message):
    answer = client.post("/classify", content=content)
    assert answer.status_code == status
    assert message in answer.json()["detail"]
    assert str(scratch) not in answer.text
    assert list(scratch.iterdir()) == []


def test_a_body_without_a_length_is_counted_as_it_comes(client, scratch):
    answer = client.post("/classify", content=(b"x" * 50_000 for _ in range(100)))
    assert answer.status_code == 413
    assert list(scratch.iterdir()) == []


def test_duration_and_pixels_are_bounded(client, tmp_path):
    long = films.write(tmp_path / "long.mp4", films.moving(100, height=16, width=16, step=(0, 0)))
    assert "at most 3 s" in client.post("/classify", content=long.read_bytes()).json()["detail"]
    large = films.write(tmp_path / "large.mp4", films.moving(8, height=720, width=720, step=(0, 0)))
    assert "more than 400000 pixels" in client.post("/classify", content=large.read_bytes()).json()["detail"]
    much = films.write(tmp_path / "much.mp4", films.moving(60, height=256, width=256, step=(0, 0)))
    assert "million pixels, at most 2" in client.post("/classify", content=much.read_bytes()).json()["detail"]


@pytest.mark.parametrize(
    "name", ["../../escape.mp4", "/etc/passwd", "a;touch pwned.mp4", "$(touch pwned)", "x\x00.mp4"]
)
def test_the_sender_s_file_name_means_nothing(client, scratch, tmp_path, video, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(each for each in tmp_path.rglob("*") if "scratch" not in each.name)
    assert client.post("/classify", files={"video": (name, video.read_bytes())}).status_code == 200
    assert sorted(each for each in tmp_path.rglob("*") if "scratch" not in each.name) == before
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\n{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {path}\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        '<?xml version="1.0"?><MPD><Period><BaseURL>{path}</BaseURL></Period></MPD>',
    ],
)
def test_an_upload_cannot_make_it_read_another_file(client, tmp_path, playlist):
    secret = films.write(tmp_path / "secret.ts", films.moving(30), codec="mpeg2video")
    answer = client.post("/classify", content=playlist.format(path=secret).encode())
    assert answer.status_code == 422, answer.text


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"not a form"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="top"\r\n\r\n5\r\n--b--\r\n'),
    ],
)
def test_a_form_without_a_file_is_refused(client, kind, body):
    answer = client.post("/classify", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert "upload: expected" in answer.json()["detail"]


def test_a_damaged_video_is_labelled_by_what_is_left_and_says_so(client, tmp_path):
    whole = films.write(tmp_path / "whole.mkv", films.moving(60, height=48, width=64)).read_bytes()
    answer = client.post("/classify", content=whole[: int(len(whole) * 0.6)]).json()
    assert answer["ok"] is False
    assert "upload" in answer["problem"]
    assert answer["label"] in deployed.LABELS


def test_a_crowd_is_sent_away_and_the_others_are_served(model, video, scratch):
    held, go_on = threading.Event(), threading.Event()

    def slow(inputs):
        held.set()
        assert go_on.wait(30)
        return model._program(inputs)

    app = create_app(Model(model.path, model.signature, slow), ServiceLimits(at_once=1, waiting=1))
    answers = []
    with TestClient(app) as client:
        threads = [
            threading.Thread(target=lambda: answers.append(client.post("/classify", content=video.read_bytes())))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        assert held.wait(30)
        while client.get("/health").json()["waiting"] < 2:
            time.sleep(0.01)
        assert client.post("/classify", content=video.read_bytes()).status_code == 503
        go_on.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert client.get("/health").json()["waiting"] == 0


def test_a_model_without_labels_is_refused():
    made = deployed.classifier(("rgb",), labels=())
    silent = Model(Path("m.pt2"), deployed.signature(made, labels=()), deployed.Live(made))
    with pytest.raises(InvalidInput, match="features alone"):
        create_app(silent)


@contextmanager
def served(app):
    """The service on a free port of this machine."""
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(20)


def begun(port, length):
    """A connection that has announced an upload and sent none of it yet."""
    opened = socket.create_connection(("127.0.0.1", port), timeout=20)
    opened.sendall(f"POST /classify HTTP/1.1\r\nHost: here\r\nContent-Length: {length}\r\n\r\n".encode())
    return opened


def answer_to(connection):
    with HTTPResponse(connection) as answer:
        answer.begin()
        return answer.status, answer.read().decode()


def is_answered(connection):
    return bool(select.select([connection], [], [], 0)[0])


def post(port, content):
    with begun(port, len(content)) as connection:
        connection.sendall(content)
        return answer_to(connection)


def test_who_sends_nothing_does_not_keep_others_out(model, scratch, video):
    with served(create_app(model, ServiceLimits(waiting=2, patience=1.5))) as port:
        silent = [begun(port, 1000) for _ in range(3)]
        silent[0].sendall(b"x" * 10)
        while len(list(scratch.iterdir())) < len(silent):
            time.sleep(0.01)
        assert post(port, video.read_bytes())[0] == 503
        for connection in silent:
            with connection:
                status, text = answer_to(connection)
                assert status == 408
                assert "expected 32768 bytes a second, got fewer for 1.5 s" in text
                assert connection.recv(1) == b"", "left open"
        assert post(port, video.read_bytes())[0] == 200
    assert list(scratch.iterdir()) == []


def test_a_trickle_is_sent_away_and_a_steady_upload_may_take_long(model, scratch, video):
    content = video.read_bytes()
    limits = ServiceLimits(slowest=len(content) / 8, patience=1.5)
    parts = [content[first : first + len(content) // 8 + 1] for first in range(0, len(content), len(content) // 8 + 1)]
    with (
        served(create_app(model, limits)) as port,
        begun(port, len(content)) as steady,
        begun(port, 10**8) as trickle,
        begun(port, 10**8) as burst,
    ):
        burst.sendall(b"x" * (20 * len(content)))  # far ahead of its time, which is not saved up
        started, drops = time.monotonic(), 0
        for part in parts:
            steady.sendall(part)
            if not is_answered(trickle):
                trickle.sendall(b"x")
                drops += 1
            time.sleep(0.5)
        assert time.monotonic() - started > 2 * limits.patience
        assert answer_to(steady)[0] == 200
        assert drops < len(parts)
        assert is_answered(burst)
        assert [answer_to(each)[0] for each in (trickle, burst)] == [408, 408]


@pytest.fixture
def address(model, scratch):
    with served(create_app(model)) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium with an empty profile of its own."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with its chromedriver on PATH")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield opened
    opened.quit()


DROP = """
const [target, name, base64] = arguments;
const bytes = Uint8Array.from(atob(base64), (each) => each.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], name));
for (const kind of ["dragover", "drop"])
  target.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
"""


def test_the_page_in_a_real_browser(address, browser, model, video):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(address)
    wait = WebDriverWait(browser, 30)

    def text(name):
        return browser.find_element(By.ID, name).text

    wait.until(lambda _: "3 labels from rgb" in text("model"))
    expected = next(predict(model, [video]))

    # chosen by the file dialogue's input
    browser.find_element(By.ID, "file").send_keys(str(video))
    wait.until(lambda _: text("label"))
    assert text("label") == expected.best()[0][0]
    rows = browser.find_elements(By.CSS_SELECTOR, "#timeline li")
    assert len(rows) == len(expected.windows)
    top = [each.text.split() for each in browser.find_elements(By.CSS_SELECTOR, "#top li")]
    assert top == [[label, f"{score:.3f}"] for label, score in expected.best(5)]

    # dropped: what is no video is refused in words, markup in its name stays text
    target = browser.find_element(By.ID, "drop")
    browser.execute_script(DROP, target, "<img src=x onerror=alert(1)>.mp4", base64.b64encode(b"nothing").decode())
    wait.until(lambda _: "not a readable video" in text("status"))
    assert not browser.find_element(By.ID, "result").is_displayed()
    assert not browser.find_elements(By.CSS_SELECTOR, "#status img")

    # dropped: a video
    browser.execute_script(DROP, target, "film.mp4", base64.b64encode(video.read_bytes()).decode())
    wait.until(lambda _: browser.find_element(By.ID, "result").is_displayed())
    assert text("label") == expected.best()[0][0]
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all(re.search(r"favicon|422", message) for message in severe), severe

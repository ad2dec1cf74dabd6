"""mocap15: videos of 15 human actions with labels, rendered from the motion captures that pybullet carries.

Every person does every action in each of four scenes, so that neither clothes nor background tell the action, and the
persons of the test videos are others. One recording per action, so all variety is made: each video has its own camera,
tempo, phase and light. A held-out video is a held-out rendering of a recording that was seen, no more.

Source: the motion captures of Peng et al., SIGGRAPH 2018 (DeepMimic), in pybullet_data; persons by scenes after the KTH
actions of Schuldt et al., ICPR 2004.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import av
import numpy as np
import numpy.typing as npt

from cascade_engine.errors import BackendUnavailable, InvalidInput
from cascade_engine.video.index import VideoEntry, VideoIndex
from cascade_engine.video.photos import Split, photographs
from cascade_engine.video.scene import SCALE, Camera, Recording, backdrop, dress, pose

ACTIONS = (
    *("backflip", "cartwheel", "crawl", "dance_a", "dance_b", "getup_facedown", "getup_faceup", "jump"),
    *("kick", "punch", "roll", "run", "spin", "spinkick", "walk"),
)
FPS = 25
SCENES = 4
_FORMAT = 3  # of what is drawn: changes whenever the same seed gives other pictures

Progress: TypeAlias = Callable[[int, int, Path], None]  # videos done, videos in all, the video just done


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be rendered; together with the installed pybullet it decides every pixel."""

    videos_per_class: int
    seed: int
    size: int
    frames: int
    test_share: float
    format: int = _FORMAT

    def split(self, number: int) -> Split:
        """The split of a class's video: its last ones are for testing."""
        tests = round(self.videos_per_class * self.test_share)
        return "test" if number >= self.videos_per_class - tests else "train"


def render(
    folder: str | PathLike[str],
    videos_per_class: int,
    seed: int,
    *,
    size: int = 96,
    frames: int = 40,
    test_share: float = 0.25,
    workers: int = 1,
    progress: Progress | None = None,
) -> VideoIndex:
    """Render the labelled videos `folder`/action/number.mp4 and their index.csv; go on where an earlier call stopped.

    Args:
        folder: made if need be.
        videos_per_class: of each of the 15 actions.
        seed: another one gives other videos.
        size: side of the pictures, even.
        frames: of each video, at 25 frames per second.
        test_share: share of each action's videos, in whole persons where it divides so, that are in split `test`; the
            others are in `train`.
        workers: processes that render.
        progress: called after each video with (videos done, videos in all, its path).

    Raises:
        InvalidInput: a count out of range, or a folder that holds videos rendered with other arguments.
        BackendUnavailable: pybullet, scikit-image or scikit-learn is not installed.
    """
    if min(videos_per_class, frames, workers) < 1 or size < 16 or size % 2 or not 0 <= test_share < 1:
        raise InvalidInput(
            "mocap15: expected counts of at least 1, an even size from 16 and a share in [0, 1), "
            f"got {videos_per_class} videos, {frames} frames, {workers} workers, size {size}, share {test_share}"
        )
    folder = Path(folder)
    request = Request(videos_per_class=videos_per_class, seed=seed, size=size, frames=frames, test_share=test_share)
    _settle(folder, request)
    names = [(action, number) for action in ACTIONS for number in range(videos_per_class)]
    todo = [name for name in names if not _file(folder, name).exists()]
    if progress is not None and len(todo) < len(names):
        progress(len(names) - len(todo), len(names), _file(folder, names[-1]))
    for done, name in enumerate(_each(todo, partial(_render_one, folder, request), workers), len(names) - len(todo)):
        if progress is not None:
            progress(done + 1, len(names), _file(folder, name))
    entries = [
        VideoEntry(path=_file(folder, (action, number)), video_id=0, label=action, split=request.split(number))
        for action, number in names
    ]
    index = VideoIndex(entries)
    index.to_csv(folder / "index.csv")
    return index


def _file(folder: Path, name: tuple[str, int]) -> Path:
    return folder / name[0] / f"{name[1]:04d}.mp4"


def _settle(folder: Path, request: Request) -> None:
    """Write what is rendered here, or compare it with what was."""
    note = folder / "mocap15.json"
    if note.exists():
        there = json.loads(note.read_text(encoding="utf-8"))
        if there != asdict(request):
            raise InvalidInput(f"{folder}: expected videos rendered with {asdict(request)}, found {there}")
        return
    for action in ACTIONS:
        (folder / action).mkdir(parents=True, exist_ok=True)
    fresh = note.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(request)), encoding="utf-8")
    fresh.replace(note)


def _each(
    names: Sequence[tuple[str, int]], work: Callable[[tuple[str, int]], None], workers: int
) -> Iterator[tuple[str, int]]:
    """Do the work for each name, and hand the name on once it is done."""
    if workers == 1 or len(names) < 2:
        for name in names:
            work(name)
            yield name
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for name, _ in zip(names, pool.map(work, names), strict=True):
                yield name
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _render_one(folder: Path, request: Request, name: tuple[str, int]) -> None:
    """Render one video, wholly or not at all."""
    action, number = name
    file = _file(folder, name)
    fresh = file.with_suffix(".new")
    with _quiet():
        pictures = _pictures(action, number, request)
    write_video(fresh, pictures)
    fresh.rename(file)


def write_video(path: Path, pictures: npt.NDArray[np.uint8]) -> None:
    """Encode (T, H, W, 3) RGB pictures as H.264 at 25 frames per second in an MP4 file; equal pictures, equal bytes."""
    # With its macroblock tree x264 wrote other bytes in 4 of 1,500 encodings on a busy machine, without in none.
    settings = "threads=1:lookahead-threads=1:sync-lookahead=0:mbtree=0"
    options = {"crf": "18", "preset": "veryfast", "x264-params": settings}
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as out:
        stream: Any = out.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            out.mux(stream.encode(frame.reformat(format="yuv420p", threads=1)))
        out.mux(stream.encode(None))


def person(request: Request, number: int) -> np.random.Generator:
    """What the person in a class's video of that number is drawn from: the same in every action and in each scene."""
    return np.random.default_rng([request.seed, len(ACTIONS), request.split(number) == "test", number // SCENES])


def _pictures(action: str, number: int, request: Request) -> npt.NDArray[np.uint8]:
    """The frames (T, size, size, 3) of one video."""
    bullet, data = _pybullet()
    rng = np.random.default_rng([request.seed, ACTIONS.index(action), number])
    client = bullet.connect(bullet.DIRECT)
    try:
        body = bullet.loadURDF(
            f"{data}/humanoid/humanoid.urdf",
            useFixedBase=True,
            globalScaling=SCALE,
            flags=bullet.URDF_MAINTAIN_LINK_ORDER,
            physicsClientId=client,
        )
        build = dress(bullet, client, body, person(request, number))
        motion = Recording.load(f"{data}/data/motions/humanoid3d_{action}.txt")
        camera = Camera.draw(rng, build)
        tempo, phase = rng.uniform(0.75, 1.35), rng.uniform(0, motion.cycle)
        scene = number % SCENES
        place = np.random.default_rng([request.seed, len(ACTIONS) + 1, scene])
        behind = backdrop(place, photographs("train")[scene::SCENES], request.size)
        shots = np.empty((request.frames, request.size, request.size, 3), np.uint8)
        for t in range(request.frames):
            row = motion.at(phase + tempo * t / FPS)
            pose(bullet, client, body, row)
            figure, inside = camera.shoot(bullet, client, row, t / FPS, request.size)
            picture = np.where(inside[..., None], figure, behind)
            shots[t] = np.clip(picture + rng.normal(0, 2.0, (request.size, request.size, 1)), 0, 255)
        return shots
    finally:
        bullet.disconnect(client)


def _pybullet() -> tuple[Any, str]:
    try:
        import pybullet
        import pybullet_data
    except ImportError:
        raise BackendUnavailable("pybullet is not installed: pip install 'cascade-engine[demo]'") from None
    return pybullet, str(pybullet_data.getDataPath())


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing to the terminal: pybullet's C code prints its build time and remarks on its own model."""
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for handle in (*kept, nowhere):
            os.close(handle)

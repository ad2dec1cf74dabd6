"""mocap15: videos of 15 human actions with labels, rendered from the motion captures that pybullet carries.

One recording per action, so all variety is made: each video has its own camera, tempo, phase, colours, light, build and
photographic background. A held-out video is a held-out rendering of a recording that was seen, no more.

Source: the motion captures of Peng et al., SIGGRAPH 2018 (DeepMimic), in pybullet_data.
"""

from __future__ import annotations

import json
import math
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
import cv2
import numpy as np
import numpy.typing as npt

from cascade_engine.errors import BackendUnavailable, InvalidInput
from cascade_engine.video.index import VideoEntry, VideoIndex
from cascade_engine.video.photos import Photo, Split, photographs

ACTIONS = (
    *("backflip", "cartwheel", "crawl", "dance_a", "dance_b", "getup_facedown", "getup_faceup", "jump"),
    *("kick", "punch", "roll", "run", "spin", "spinkick", "walk"),
)
FPS = 25
_FORMAT = 1  # of what is drawn: changes whenever the same seed gives other pictures
_REST = 0.3  # seconds in which a recording that does not loop goes back to its beginning
_SCALE = 0.25  # of pybullet's humanoid, for which the recordings were made

# Joints in the order of a recording's rows, with the numbers each has there (a quaternion or an angle).
_JOINTS = (
    *(("chest", 4), ("neck", 4), ("right_hip", 4), ("right_knee", 1), ("right_ankle", 4), ("right_shoulder", 4)),
    *(
        ("right_elbow", 1),
        ("left_hip", 4),
        ("left_knee", 1),
        ("left_ankle", 4),
        ("left_shoulder", 4),
        ("left_elbow", 1),
    ),
)
_CLOTHES = {
    "shirt": ("root", "chest", "right_shoulder", "left_shoulder"),
    "skin": ("neck", "right_elbow", "left_elbow", "right_wrist", "left_wrist"),
    "trousers": ("right_hip", "left_hip", "right_knee", "left_knee"),
    "shoes": ("right_ankle", "left_ankle"),
}

Progress: TypeAlias = Callable[[int, int, Path], None]  # videos done, videos in all, the video just done
Row: TypeAlias = npt.NDArray[np.float64]


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
        test_share: share of each action's videos that are in split `test`, the others are in `train`. Their
            backgrounds come from different parts of the photographs.
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
    rng = np.random.default_rng([request.seed, ACTIONS.index(action), number])
    file = _file(folder, name)
    fresh = file.with_suffix(".new")
    with _quiet():
        pictures = _pictures(action, request, request.split(number), rng)
    write_video(fresh, pictures)
    fresh.rename(file)


def write_video(path: Path, pictures: npt.NDArray[np.uint8]) -> None:
    """Encode (T, H, W, 3) RGB pictures as H.264 at 25 frames per second in an MP4 file; the same bytes every time."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as out:
        stream: Any = out.add_stream("libx264", rate=FPS, options={"crf": "18", "preset": "veryfast", "threads": "1"})
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))


def _pictures(action: str, request: Request, split: Split, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The frames (T, size, size, 3) of one video, with everything about it drawn from `rng`."""
    bullet, data = _pybullet()
    client = bullet.connect(bullet.DIRECT)
    try:
        body = bullet.loadURDF(
            f"{data}/humanoid/humanoid.urdf",
            useFixedBase=True,
            globalScaling=_SCALE,
            flags=bullet.URDF_MAINTAIN_LINK_ORDER,
            physicsClientId=client,
        )
        _dress(bullet, client, body, rng)
        motion = Recording.load(f"{data}/data/motions/humanoid3d_{action}.txt")
        camera = Camera.draw(rng)
        tempo, phase = rng.uniform(0.75, 1.35), rng.uniform(0, motion.cycle)
        backdrop = Backdrop.draw(rng, photographs(split), request.size, request.frames)
        gains = rng.uniform(0.85, 1.15, 3)
        shots = np.empty((request.frames, request.size, request.size, 3), np.uint8)
        for t in range(request.frames):
            row = motion.at(phase + tempo * t / FPS)
            _pose(bullet, client, body, row)
            figure, inside = camera.shoot(bullet, client, row, t / FPS, request.size)
            picture = np.where(inside[..., None], figure, backdrop.at(t)) * gains
            shots[t] = np.clip(picture + rng.normal(0, 2.0, (request.size, request.size, 1)), 0, 255)
        return shots
    finally:
        bullet.disconnect(client)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A motion capture: rows of seconds, root position and joint rotations."""

    rows: Row  # (n, 44)
    start: Row  # (n,) seconds
    cycle: float  # seconds until it repeats

    @classmethod
    def load(cls, path: str) -> Recording:
        """Read pybullet's JSON; one that does not loop goes back to its beginning within `_REST` seconds."""
        told = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = np.array(told["Frames"], np.float64)
        start = np.concatenate([[0.0], np.cumsum(rows[:-1, 0])])
        loops = told["Loop"] == "wrap"
        return cls(rows=rows, start=start, cycle=float(start[-1] + (rows[-2, 0] if loops else _REST)))

    def at(self, seconds: float) -> Row:
        """The row (44,) at a time, between its neighbours; past the last row it goes back to the first."""
        seconds %= self.cycle
        left = int(np.searchsorted(self.start, seconds, side="right")) - 1
        right = (left + 1) % len(self.rows)
        until = self.start[right] if right else self.cycle
        share = (seconds - self.start[left]) / (until - self.start[left])
        before, after = self.rows[left], self.rows[right].copy()
        if right == 0:
            after[[1, 3]] = before[[1, 3]]  # where it walked to is where it goes on
        for place in _quaternions():
            # q and -q are one rotation: take the nearer, or the limb swings the long way round.
            if before[place] @ after[place] < 0:
                after[place] = -after[place]
        row = before * (1 - share) + after * share
        for place in _quaternions():
            row[place] /= np.linalg.norm(row[place])
        return np.asarray(row)


def _quaternions() -> Iterator[slice]:
    """Where the quaternions of a row lie: the root's, then the joints'."""
    yield slice(4, 8)
    place = 8
    for _, numbers in _JOINTS:
        if numbers == 4:
            yield slice(place, place + 4)
        place += numbers


@dataclass(frozen=True, kw_only=True)
class Camera:
    """Follows the body on the ground and turns slowly."""

    yaw: float  # degrees
    turning: float  # degrees per second
    pitch: float
    distance: float
    height: float
    aspect: float  # of the projection: a stouter or slimmer build
    light: tuple[float, float, float]
    ambient: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Camera:
        """A camera and light of their own for one video."""
        around = rng.uniform(0, 2 * math.pi)
        return cls(
            yaw=rng.uniform(0, 360),
            turning=rng.uniform(-12, 12),
            pitch=rng.uniform(-25, 0),
            distance=rng.uniform(2.2, 3.2),
            height=rng.uniform(0.7, 0.95),
            aspect=rng.uniform(0.85, 1.15),
            light=(math.cos(around), rng.uniform(1, 2.5), math.sin(around)),
            ambient=rng.uniform(0.45, 0.7),
        )

    def shoot(
        self, bullet: Any, client: int, row: Row, seconds: float, size: int
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """The picture (size, size, 3) and where in it the body is (size, size)."""
        target = [row[1], self.height, row[3]]
        yaw = self.yaw + self.turning * seconds
        view = bullet.computeViewMatrixFromYawPitchRoll(target, self.distance, yaw, self.pitch, 0, 1)
        lens = bullet.computeProjectionMatrixFOV(50, self.aspect, 0.1, 20)
        _, _, pixels, _, body = bullet.getCameraImage(
            size,
            size,
            view,
            lens,
            renderer=bullet.ER_TINY_RENDERER,
            lightDirection=list(self.light),
            lightAmbientCoeff=self.ambient,
            shadow=0,
            physicsClientId=client,
        )
        picture = np.asarray(pixels, np.uint8).reshape(size, size, 4)[..., :3]
        return picture, np.asarray(body).reshape(size, size) >= 0


@dataclass(frozen=True, kw_only=True)
class Backdrop:
    """A part of a photograph, larger than the picture, over which the picture's window glides."""

    photo: Photo
    start: npt.NDArray[np.float64]  # (2,) x and y of the window in the first frame
    step: npt.NDArray[np.float64]  # (2,) pixels a frame
    size: int

    @classmethod
    def draw(cls, rng: np.random.Generator, photos: Sequence[Photo], size: int, frames: int) -> Backdrop:
        """A place in one of the photographs, its contrast and the way the window glides."""
        photo = photos[int(rng.integers(len(photos)))]
        room = 1.25
        side = int(min(photo.shape[:2]) * rng.uniform(0.4, 1.0))
        top, left = rng.integers(photo.shape[0] - side + 1), rng.integers(photo.shape[1] - side + 1)
        wide = int(size * room)
        part = cv2.resize(photo[top : top + side, left : left + side], (wide, wide), interpolation=cv2.INTER_AREA)
        mean = part.mean((0, 1), keepdims=True)
        part = np.clip((part - mean) * rng.uniform(0.3, 0.75) + mean * rng.uniform(0.6, 1.1), 0, 255)
        ends = rng.uniform(0, wide - size, (2, 2))
        return cls(photo=part.astype(np.uint8), start=ends[0], step=(ends[1] - ends[0]) / max(frames, 40), size=size)

    def at(self, t: int) -> npt.NDArray[np.uint8]:
        """The window (size, size, 3) in frame t."""
        x, y = self.start + self.step * t
        shift = np.array([[1, 0, -x], [0, 1, -y]])
        moved = cv2.warpAffine(self.photo, shift, (self.size, self.size), borderMode=cv2.BORDER_REFLECT)
        return np.asarray(moved, np.uint8)


def _dress(bullet: Any, client: int, body: int, rng: np.random.Generator) -> None:
    """Paint skin, shirt, trousers and shoes."""
    paint = {name: rng.uniform(0.1, 0.95, 3) for name in _CLOTHES}
    paint["skin"] = np.array([0.95, 0.75, 0.6]) * rng.uniform(0.35, 1.0)
    garment = {link: name for name, links in _CLOTHES.items() for link in links}
    for joint in range(-1, bullet.getNumJoints(body, physicsClientId=client)):
        link = "root" if joint < 0 else bullet.getJointInfo(body, joint, physicsClientId=client)[12].decode()
        colour = [*paint[garment.get(link, "shirt")], 1.0]
        bullet.changeVisualShape(body, joint, rgbaColor=colour, physicsClientId=client)


def _pose(bullet: Any, client: int, body: int, row: Row) -> None:
    """Put the body into the posture of a row; a row has w first, pybullet last."""
    count = bullet.getNumJoints(body, physicsClientId=client)
    told = [bullet.getJointInfo(body, joint, physicsClientId=client) for joint in range(count)]
    joints = {info[12].decode(): info[0] for info in told}
    bullet.resetBasePositionAndOrientation(body, row[1:4], [*row[5:8], row[4]], physicsClientId=client)
    place = 8
    for name, numbers in _JOINTS:
        if numbers == 4:
            turn = [*row[place + 1 : place + 4], row[place]]
            bullet.resetJointStateMultiDof(body, joints[name], turn, physicsClientId=client)
        else:
            bullet.resetJointState(body, joints[name], row[place], physicsClientId=client)
        place += numbers


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

"""What a rendered video shows: a recording's postures on pybullet's humanoid, a camera, and a photograph behind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from cascade_engine.video.photos import Photo

SCALE = 0.25  # of pybullet's humanoid, for which the recordings were made
_REST = 0.3  # seconds in which a recording that does not loop goes back to its beginning

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

Row: TypeAlias = npt.NDArray[np.float64]


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
        for place in quaternions():
            # q and -q are one rotation: take the nearer, or the limb swings the long way round.
            if before[place] @ after[place] < 0:
                after[place] = -after[place]
        row = before * (1 - share) + after * share
        for place in quaternions():
            row[place] /= np.linalg.norm(row[place])
        return np.asarray(row)


def quaternions() -> Iterator[slice]:
    """Where the quaternions of a row lie: the root's, then the joints'."""
    yield slice(4, 8)
    place = 8
    for _, numbers in _JOINTS:
        if numbers == 4:
            yield slice(place, place + 4)
        place += numbers


@dataclass(frozen=True, kw_only=True)
class Camera:
    """Follows the body on the ground, from its left or right, aimed only roughly, and turns slowly."""

    yaw: float  # degrees
    turning: float  # degrees per second
    pitch: float
    distance: float
    height: float
    aside: tuple[float, float]  # how far from the picture's middle the body is seen, in halves of the picture
    aspect: float  # of the projection: a stouter or slimmer build
    light: tuple[float, float, float]
    ambient: float

    @classmethod
    def draw(cls, rng: np.random.Generator, build: float) -> Camera:
        """A camera and light of their own for one video of a person of that build."""
        around = rng.uniform(0, 2 * math.pi)
        return cls(
            yaw=rng.choice([-1.0, 1.0]) * rng.uniform(30, 60),
            turning=rng.uniform(-6, 6),
            pitch=rng.uniform(-12, 0),
            distance=rng.uniform(1.6, 3.6),
            height=rng.uniform(0.7, 0.95),
            aside=(rng.uniform(-0.5, 0.5), rng.uniform(-0.35, 0.35)),
            aspect=build,
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
        lens = list(bullet.computeProjectionMatrixFOV(50, self.aspect, 0.1, 20))
        lens[8:10] = self.aside
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


def backdrop(rng: np.random.Generator, photos: Sequence[Photo], size: int) -> Photo:
    """Where a video takes place: a part of one of the photographs, paler, (size, size, 3)."""
    photo = photos[int(rng.integers(len(photos)))]
    side = int(min(photo.shape[:2]) * rng.uniform(0.4, 1.0))
    top, left = rng.integers(photo.shape[0] - side + 1), rng.integers(photo.shape[1] - side + 1)
    part = cv2.resize(photo[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_AREA)
    mean = part.mean((0, 1), keepdims=True)
    pale = (part - mean) * rng.uniform(0.3, 0.75) + mean * rng.uniform(0.6, 1.1)
    return np.asarray(np.clip(pale, 0, 255), np.uint8)


def dress(bullet: Any, client: int, body: int, rng: np.random.Generator) -> float:
    """Paint a person's skin, shirt, trousers and shoes; the person's build, as the aspect of a camera."""
    paint = {name: rng.uniform(0.1, 0.95, 3) for name in _CLOTHES}
    paint["skin"] = np.array([0.95, 0.75, 0.6]) * rng.uniform(0.35, 1.0)
    garment = {link: name for name, links in _CLOTHES.items() for link in links}
    for joint in range(-1, bullet.getNumJoints(body, physicsClientId=client)):
        link = "root" if joint < 0 else bullet.getJointInfo(body, joint, physicsClientId=client)[12].decode()
        colour = [*paint[garment.get(link, "shirt")], 1.0]
        bullet.changeVisualShape(body, joint, rgbaColor=colour, physicsClientId=client)
    return float(rng.uniform(0.85, 1.15))


def pose(bullet: Any, client: int, body: int, row: Row) -> None:
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

"""The mining benchmark's cases: plans, sizes, families of data, and the factors asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput
from cascade_engine.plan import CascadePlan

Family = Literal["unit", "common-mean", "outlier", "video", "clustered", "lengths"]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

CLIPS_A_VIDEO = 32
INPUT_SETS = 4  # query batches that the calls rotate through


@dataclass(frozen=True, kw_only=True)
class Bar:
    """The engine is asked to be at least `factor` times as fast as `peer` (a contestant, or the fastest exact one)."""

    peer: str
    factor: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting to measure.

    Args:
        name: how `--case` finds it.
        group: the story it belongs to.
        plan: plan text over the views ``flow`` and ``rgb``.
        queries: B.
        keys: K.
        width: D of every view.
        family: kind of data.
        exclude: whether each query's own video is excluded.
        bars: the factors asked for.
    """

    name: str
    group: str
    plan: str
    queries: int
    keys: int
    width: int = 128
    family: Family = "unit"
    exclude: bool = False
    bars: tuple[Bar, ...] = ()

    @property
    def parsed(self) -> CascadePlan:
        """The plan."""
        return CascadePlan.parse(self.plan)

    @property
    def single_view(self) -> bool:
        """Whether the case is a plain top-k of one view without exclusion."""
        stages = self.parsed.stages
        return len(stages) == 1 and stages[0].score.fusion is None and not self.exclude


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Queries of one call: view to (B, D), and the video of each (B,)."""

    queries: dict[str, F32]
    video_id: I64


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The data of one case: view to keys (K, D), their videos (K,), and the batches that calls rotate through."""

    case: Case
    keys: dict[str, F32]
    video_id: I64
    batches: tuple[Batch, ...]

    @property
    def exclude(self) -> bool:
        """Whether a query's own video is excluded."""
        return self.case.exclude


def make(case: Case, seed: int = 0) -> Problem:
    """Draw the data of a case."""
    rng = np.random.default_rng(seed)
    videos = max(4, case.keys // CLIPS_A_VIDEO)
    video = rng.integers(0, videos, case.keys)
    query_video = [rng.integers(0, videos, case.queries) for _ in range(INPUT_SETS)]
    keys: dict[str, F32] = {}
    queries: list[dict[str, F32]] = [{} for _ in range(INPUT_SETS)]
    for view in case.parsed.views:
        draw = _Family(case, rng, videos)
        keys[view] = draw.rows(case.keys, video)
        for batch, ids in zip(queries, query_video, strict=True):
            batch[view] = draw.rows(case.queries, ids)
    batches = tuple(Batch(queries=q, video_id=ids) for q, ids in zip(queries, query_video, strict=True))
    return Problem(case=case, keys=keys, video_id=video, batches=batches)


class _Family:
    """One view's distribution; keys and queries are drawn from the same."""

    def __init__(self, case: Case, rng: np.random.Generator, videos: int) -> None:
        self.family, self.width, self.rng = case.family, case.width, rng
        self.mean = 2 * self._normal(1)
        groups = {"video": videos, "clustered": 256}.get(case.family, 1)
        self.centres = self._normal(groups)

    def _normal(self, rows: int) -> F32:
        return self.rng.standard_normal((rows, self.width), dtype=np.float32)

    def rows(self, count: int, video: I64) -> F32:
        x = self._normal(count)
        if self.family == "common-mean":
            x += self.mean
        elif self.family == "outlier":
            x[:, 3 % self.width] *= 12
        elif self.family == "video":
            x = self.centres[video] + np.float32(0.15) * x
        elif self.family == "clustered":
            x += np.float32(0.7) * self.centres[self.rng.integers(0, len(self.centres), count)]
        elif self.family == "lengths":
            return np.asarray(x * np.exp(self.rng.standard_normal((count, 1), dtype=np.float32)), np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return x


def _cpr(queries: int, keys: int, torch: float, published: float) -> Case:
    return Case(
        name=f"cpr-{queries}x{keys}",
        group="cpr",
        plan=str(CascadePlan.preset("cpr", oracle="flow", trainee="rgb", k=5)),
        queries=queries,
        keys=keys,
        exclude=True,
        bars=(Bar(peer="torch", factor=torch), Bar(peer="published", factor=published)),
    )


def _top(k: int, keys: int, queries: int = 256, width: int = 128, factor: float | None = None) -> Case:
    return Case(
        name=f"top{k}-{queries}x{keys}" + ("" if width == 128 else f"-d{width}"),
        group="single",
        plan=f"rgb:{k}",
        queries=queries,
        keys=keys,
        width=width,
        bars=() if factor is None else (Bar(peer="peer", factor=factor),),
    )


def _plan(name: str, group: str, text: str, keys: int, factor: float | None = None) -> Case:
    return Case(
        name=name,
        group=group,
        plan=text,
        queries=256,
        keys=keys,
        exclude=True,
        bars=() if factor is None else (Bar(peer="peer", factor=factor),),
    )


def _cases() -> tuple[Case, ...]:
    asked = {(10, 65536, 128): 4.0, (128, 65536, 128): 3.0, (1024, 65536, 128): 3.0}
    cpr = [_cpr(32, 2048, 8, 200), _cpr(32, 16384, 9, 450), _cpr(256, 16384, 10, 500), _cpr(256, 65536, 10, 500)]
    single = [
        _top(10, 2048, factor=2.2),
        _top(10, 65536, queries=32, factor=7),
        *(
            _top(k, keys, width=width, factor=asked.get((k, keys, width)))
            for keys in (65536, 1 << 20)
            for width in (128, 512)
            for k in (10, 128, 1024)
        ),
        _top(1024, 16384, queries=1024, width=512, factor=1.3),
    ]
    two = [
        _plan("two-stage-128-5", "two-stage", "flow:128,rgb:5", 65536, 3),
        _plan("two-stage-1024-50", "two-stage", "flow:1024,rgb:50", 65536, 4),
        _plan("patent", "two-stage", "rgb:1000,flow:100,rgb:3", 65536),
    ]
    fusion = [
        _plan(f"fusion-{name}", "fusion", str(CascadePlan.preset(name, oracle="flow", trainee="rgb", k=5)), 16384)
        for name in ("sum", "cma", "zsum", "rrf")
    ]
    fusion.append(_plan("fusion-mvcgc", "fusion", "flow:128,rgb:128@bank", 16384))
    families: tuple[Family, ...] = ("common-mean", "outlier", "video", "lengths")
    hard = [
        replace(case, name=f"{case.name}-{family}", group="families", family=family, bars=())
        for family in families
        for case in (_top(10, 65536), _top(128, 65536), cpr[2])
    ]
    doubling = [
        replace(_top(10, 1 << power), name=f"doubling-{power}", group="doubling", bars=()) for power in range(11, 23)
    ]
    return (*cpr, *single, *two, *fusion, *hard, *doubling)


CASES = _cases()
QUICK = ("cpr-32x2048", "top10-256x2048")


def find(names: tuple[str, ...], groups: tuple[str, ...]) -> tuple[Case, ...]:
    """The cases with these names or in these groups; all where neither is given.

    Raises:
        InvalidInput: no case or group of that name.
    """
    if not names and not groups:
        return CASES
    for name, known in ((names, {case.name for case in CASES}), (groups, {case.group for case in CASES})):
        unknown = [each for each in name if each not in known]
        if unknown:
            raise InvalidInput(f"case: expected one of {', '.join(sorted(known))}, got {unknown[0]!r}")
    return tuple(case for case in CASES if case.name in names or case.group in groups)

"""The share of a training step that mining and the loss take: the engine's, a torch version's, the published loop's.

The rest of the step is what a CPR phase of the tiny preset does besides: the query's augmentation, forward and backward
pass, the momentum encoder on the keys, the frozen oracle on its view of them, the optimiser. Mining and loss are timed
apart on a queue of K keys, with the push of the step's keys, since that is when the engine prepares them. Shares are of
processor time on all threads, which holds on a machine that others use too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import cascade_engine as ce
from cascade_engine.models import MomentumEncoder, build_encoder
from cascade_engine.training.presets import preset
from cascade_engine.video.augment import Augment

from .inputs import Batch, Case, Problem, make
from .judging import Judge
from .published import prepare_published
from .timing import clock_for, interleaved, machine, pinned
from .torch_miner import TorchMiner

PACKAGES = ("cascade-engine", "torch", "torchvision", "numpy")
PLAN = str(ce.CascadePlan.preset("cpr", oracle="flow", trainee="rgb", k=5))
TEMPERATURE = 0.07
Row = dict[str, Any]
Search = Callable[[Batch], torch.Tensor]


def run(*, batch: int = 32, keys: int = 16384, threads: int = 2, rounds: int = 5, large: bool = True) -> Row:
    """Measure the shares and return everything the table needs.

    Args:
        batch: clips of a step.
        keys: in the queue.
        threads: processors and threads.
        rounds: interleaved visits to each contestant.
        large: also a step of R3D-18 on 16 x 112 x 112, from a batch of two, scaled to `batch`.
    """
    problem = make(Case(name="step", group="step", plan=PLAN, queries=batch, keys=keys, exclude=True))
    with pinned(threads):
        judge = Judge(problem)
        miners: dict[str, Search] = {
            "torch": TorchMiner(problem, "cpu", torch.float32),
            "published": prepare_published(problem),
        }
        for name, miner in miners.items():
            if not judge(miner(problem.batches[0])).accepts(engine=False):
                raise AssertionError(f"{name}: wrong answer")
        engine, found = engine_step(problem)
        engine(0)
        if not judge(found[-1]).accepts(engine=True):
            raise AssertionError("engine: wrong answer")
        tiny = preset("tiny")
        clip = (tiny.clip.frames, tiny.clip.size, tiny.data.size)
        tiny_step = rest_of_step(tiny.model.encoder, batch, clip)
        calls: dict[str, Callable[[int], object]] = {"rest of a tiny step": tiny_step}
        calls |= {name: torch_step(problem, miner) for name, miner in miners.items()} | {"engine": engine}
        timings = {
            name: timing.as_json() for name, timing in interleaved(calls, rounds=rounds, clock=clock_for("cpu")).items()
        }
        steps = {"tiny": timings["rest of a tiny step"]["cpu_ms"]}
        if large:
            one = {"r3d": rest_of_step("r3d18", 2, (16, 112, 128))}
            taken = interleaved(one, rounds=2, clock=clock_for("cpu"))["r3d"].processor
            steps["r3d18, 16 x 112 x 112"] = taken * 1e3 * batch / 2
    shares = {
        step: {name: timings[name]["cpu_ms"] / (timings[name]["cpu_ms"] + rest) for name in (*miners, "engine")}
        for step, rest in steps.items()
    }
    settings = {"batch": batch, "keys": keys, "threads": threads, "rounds": rounds, "plan": PLAN}
    return {"machine": machine(PACKAGES), "settings": settings, "timings": timings, "rest_ms": steps, "shares": shares}


def rest_of_step(encoder: str, batch: int, clip: tuple[int, int, int]) -> Callable[[int], object]:
    """A step of a phase that trains rgb with flow as oracle, without mining and loss: the call.

    Args:
        encoder: its name.
        batch: clips.
        clip: frames, the side that the encoder sees, the side that is stored.
    """
    frames, side, stored_side = clip
    rng = np.random.default_rng(0)
    stored = {
        "rgb": rng.integers(0, 256, (batch, frames, stored_side, stored_side, 3)).astype(np.uint8),
        "flow": rng.integers(-127, 128, (batch, frames, stored_side, stored_side, 2)).astype(np.int8),
    }
    augment = Augment(size=side)
    trained, oracle = build_encoder(encoder, 3, norm_groups=2).train(), build_encoder(encoder, 2).eval()
    momentum, optimizer = MomentumEncoder(trained), torch.optim.Adam(trained.parameters())

    def step(number: int) -> None:
        draws = augment.draw(batch, rng)
        keys = {view: augment.apply(view, clips, draws) for view, clips in stored.items()}
        with torch.no_grad():
            momentum(keys["rgb"])
            oracle(keys["flow"])
        query = trained(augment.apply("rgb", stored["rgb"], augment.draw(batch, rng)))
        query.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        momentum.follow(trained)

    return step


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """A batch as the encoders leave it: keys of each view, their videos, and the trained view's queries, a leaf."""

    keys: dict[str, torch.Tensor]
    video: torch.Tensor
    query: torch.Tensor

    @classmethod
    def of(cls, batch: Batch) -> _Encoded:
        keys = {view: torch.from_numpy(values) for view, values in batch.queries.items()}
        video = torch.from_numpy(batch.video_id)
        return cls(keys=keys, video=video, query=keys["rgb"].clone().requires_grad_())


def engine_step(problem: Problem) -> tuple[Callable[[int], object], list[Any]]:
    """Mining, loss forward and backward, push: the call, and the list its answers go to.

    What is pushed are the keys that the queue held there before: the few batches that calls rotate through would soon
    fill it with copies of themselves, and equal scores are dear.
    """
    queue = ce.KeyQueue(problem.case.keys, dict.fromkeys(problem.keys, problem.case.width), device="cpu")
    queue.push({view: torch.from_numpy(keys) for view, keys in problem.keys.items()}, problem.video_id)
    plan, answers = problem.case.parsed, list[Any]()
    batches = list(map(_Encoded.of, problem.batches))
    size = problem.case.queries
    pushed = [
        (
            {view: torch.from_numpy(keys[i : i + size]) for view, keys in problem.keys.items()},
            problem.video_id[i : i + size],
        )
        for i in range(0, problem.case.keys, size)
    ]
    turns = itertools.cycle(pushed)

    def step(number: int) -> None:
        batch, bank = batches[number % len(batches)], queue.bank()
        found = ce.mine(plan, batch.keys, bank, batch.video)
        answers[:] = [found.index]
        loss = ce.multi_positive_nce(
            batch.query, batch.keys["rgb"], bank, found, view="rgb", temperature=TEMPERATURE, query_video_id=batch.video
        )
        batch.query.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        queue.push(*next(turns))

    return step, answers


def torch_step(problem: Problem, miner: Search) -> Callable[[int], object]:
    """Mining by `miner`, the loss in plain torch over a (B, 1 + K) array, forward and backward: the call."""
    bank = torch.from_numpy(problem.keys["rgb"])
    video = torch.from_numpy(problem.video_id)
    batches = list(map(_Encoded.of, problem.batches))

    def step(number: int) -> None:
        batch = batches[number % len(batches)]
        positives = miner(problem.batches[number % len(batches)])
        query, key = batch.query, batch.keys["rgb"]
        scores = torch.cat([(query * key).sum(1, keepdim=True), query @ bank.T], 1) / TEMPERATURE
        member = torch.zeros(scores.shape, dtype=torch.bool)
        member[:, 1:] = batch.video[:, None] == video[None]
        member.scatter_(1, positives + 1, True)
        member[:, 0] = True
        loss = scores.logsumexp(1) - scores.masked_fill(~member, -torch.inf).logsumexp(1)
        query.grad = None
        loss.mean().backward()  # type: ignore[no-untyped-call]

    return step


def table(results: Row) -> str:
    """The shares as Markdown."""
    names = ("engine", "torch", "published")
    timings, settings = results["timings"], results["settings"]
    lines = [
        f"| B = {settings['batch']}, K = {settings['keys']} | rest of the step | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
        "| mining + loss, ms | | " + " | ".join(f"{timings[name]['cpu_ms']:.1f}" for name in names) + " |",
    ]
    for step, rest in results["rest_ms"].items():
        cells = " | ".join(f"{results['shares'][step][name]:.1%}" for name in names)
        lines.append(f"| share of a step: {step} | {rest:.0f} ms | {cells} |")
    return "\n".join(lines)

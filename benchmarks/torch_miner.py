"""A well-written torch miner: each view's product once, into memory kept between calls, then top-k stage by stage."""

from __future__ import annotations

import numpy as np
import torch

from cascade_engine.plan import RRF_OFFSET, Score

from .inputs import Batch, Problem


class TorchMiner:
    """Products and successive top-k over any plan; exact up to the rounding of `dtype`."""

    def __init__(self, problem: Problem, device: str, dtype: torch.dtype) -> None:
        """Place keys and buffers."""
        self.case, self.plan, self.dtype, self.device = problem.case, problem.case.parsed, dtype, device
        self.counts = self.plan.counts(problem.case.keys)
        self.keys = {view: torch.from_numpy(keys).to(device, dtype) for view, keys in problem.keys.items()}
        shape = (problem.case.queries, problem.case.keys)
        self.scores = {view: torch.empty(shape, dtype=dtype, device=device) for view in self.keys}
        self.slots = _slots_of_videos(problem).to(device) if problem.exclude else None
        open_stages = [s for n, s in enumerate(self.plan.stages) if n == 0 or s.over_bank]
        self.masked = {view for stage in open_stages for view in stage.score.views}
        self.batches = {
            id(batch): {view: torch.from_numpy(q).to(device, dtype) for view, q in batch.queries.items()}
            for batch in problem.batches
        }

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Score every view, then select."""
        queries = self.batches[id(batch)]
        for view, keys in self.keys.items():
            torch.mm(queries[view], keys.T, out=self.scores[view])
        sigma = {v: self.scores[v].float().std(1, unbiased=False) for v in self._standardised()}
        if self.slots is not None:
            self._exclude(self.slots[torch.from_numpy(batch.video_id).to(self.device)])
        alive: torch.Tensor | None = None
        for number, (stage, count) in enumerate(zip(self.plan.stages, self.counts, strict=True)):
            ordered = number == len(self.counts) - 1 or stage.over_bank
            if stage.over_bank or alive is None:
                best = self._ranked(stage.score, None, sigma).topk(count, dim=1, sorted=ordered).indices
                alive = best if alive is None else self._intersection(alive, best)
            else:
                best = self._ranked(stage.score, alive, sigma).topk(count, dim=1, sorted=ordered).indices
                alive = alive.gather(1, best)
        if alive is None:
            raise AssertionError("a plan has stages")
        return alive

    def _standardised(self) -> list[str]:
        return [view for stage in self.plan.stages if stage.score.fusion == "zsum" for view in stage.score.views]

    def _exclude(self, own: torch.Tensor) -> None:
        rows = torch.arange(len(own), device=own.device)[:, None].expand_as(own)
        there = own >= 0
        rows, slots = rows[there], own[there]
        for view in self.masked:
            self.scores[view].index_put_((rows, slots), torch.tensor(-torch.inf, dtype=self.dtype, device=own.device))

    def _ranked(self, score: Score, alive: torch.Tensor | None, sigma: dict[str, torch.Tensor]) -> torch.Tensor:
        columns = [self.scores[view] if alive is None else self.scores[view].gather(1, alive) for view in score.views]
        if score.fusion is None:
            return columns[0]
        gone = columns[0] == -torch.inf
        if score.fusion == "zsum":
            weights = [(1 / sigma[view]).to(torch.bfloat16).to(self.dtype)[:, None] for view in score.views]
            columns = [weight * column for weight, column in zip(weights, columns, strict=True)]
        if score.fusion == "rrf":
            columns = [1 / (RRF_OFFSET + _rank(column).double()) for column in columns]
        fused = columns[0]
        for column in columns[1:]:
            combine = {"min": torch.minimum, "max": torch.maximum}.get(score.fusion, torch.add)
            fused = combine(fused, column)
        return fused.masked_fill_(gone, -torch.inf)

    def _intersection(self, alive: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """The members of `best` that are alive, moved to the front in their order; -1 after them."""
        among = torch.zeros(len(alive), self.case.keys, dtype=torch.bool, device=alive.device)
        among.scatter_(1, alive, value=True)
        left = among.gather(1, best)
        order = torch.argsort((~left).to(torch.uint8), dim=1, stable=True)
        return best.masked_fill(~left, -1).gather(1, order)


def _rank(values: torch.Tensor) -> torch.Tensor:
    order = values.argsort(dim=1, descending=True)
    places = torch.arange(1, values.shape[1] + 1, device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _slots_of_videos(problem: Problem) -> torch.Tensor:
    """(videos, most clips of one) slots of each video's keys, -1 padded: far cheaper than comparing (B, K) ids."""
    video = problem.video_id
    last = max(int(video.max(initial=-1)), *(int(batch.video_id.max(initial=-1)) for batch in problem.batches))
    order = np.argsort(video, kind="stable")
    counts = np.bincount(video, minlength=last + 1)
    starts = np.cumsum(counts) - counts
    table = np.full((last + 1, int(counts.max(initial=0))), -1, np.int64)
    table[video[order], np.arange(len(video)) - starts[video[order]]] = order
    return torch.from_numpy(table)

"""The published cascade miner's algorithm, written out: features of all survivors gathered, a Python loop per sample.

Every stage but the last gathers both views' features of each query's survivors, which is why it takes
B x K/2 x D floats twice, and walks the batch in Python to do so; the scores of each stage are computed anew from them.

Source: Wu et al., CVPRW 2022 (cascade positive retrieval), section 3.2 and its published implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from .inputs import Batch, Case, Problem

_MEMORY = 1 << 32  # bytes of gathered features it may take


def refuse_published(case: Case) -> str | None:
    """It knows the alternating cascade of two views with three stages or more, and takes much memory."""
    stages = case.parsed.stages
    plain = all(stage.score.fusion is None and not stage.over_bank for stage in stages)
    views = [stage.score.views[0] for stage in stages]
    alternating = len(set(views)) == 2 and all(a != b for a, b in pairwise(views))
    if not plain or len(stages) < 3 or not alternating:
        return "cascades of two alternating views only"
    needed = 2 * case.queries * case.parsed.counts(case.keys)[0] * case.width * 4
    return f"its gathered features take {needed / 2**30:.1f} GiB" if needed > _MEMORY else None


def prepare_published(problem: Problem) -> Callable[[Batch], torch.Tensor]:
    """Keys as columns, as the published queue holds them."""
    plan, counts = problem.case.parsed, problem.case.parsed.counts(problem.case.keys)
    main, other = plan.views
    columns = {view: torch.from_numpy(keys).T.contiguous() for view, keys in problem.keys.items()}
    video = torch.from_numpy(problem.video_id)

    def mine(batch: Batch) -> torch.Tensor:
        anchors = {view: torch.from_numpy(queries) for view, queries in batch.queries.items()}
        own = torch.from_numpy(batch.video_id)[:, None] == video[None]
        banks = {view: keys.T for view, keys in columns.items()}
        scores = torch.einsum("bd,kd->bk", anchors[main], banks[main].clone())
        if problem.exclude:
            scores[own] = -torch.inf
        chosen = torch.topk(scores, counts[0], dim=1).indices
        size = (len(chosen), counts[0], problem.case.width)
        features = {view: banks[view].index_select(0, chosen.reshape(-1)).view(size) for view in (main, other)}
        for number in range(1, len(counts)):
            view, count = plan.stages[number].score.views[0], counts[number]
            scores = torch.bmm(features[view], anchors[view][:, :, None])[:, :, 0]
            best = torch.topk(scores, count, dim=1).indices
            if number < len(counts) - 1:
                for each in (main, other):
                    rows = [features[each][row].index_select(0, best[row]) for row in range(len(best))]
                    features[each] = torch.stack(rows)
            chosen = torch.stack([chosen[row].index_select(0, best[row]) for row in range(len(best))])
        return chosen

    return mine

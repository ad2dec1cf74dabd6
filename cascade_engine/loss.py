"""The contrastive loss with several positives per query, over a bank of keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from cascade_engine.bank import Bank
from cascade_engine.errors import InvalidInput
from cascade_engine.mining import Positives, mine
from cascade_engine.plan import CascadePlan

Reduction = Literal["logsumexp", "mean_log"]
Siblings = Literal["positive", "ignore", "negative"]


def multi_positive_nce(
    query: torch.Tensor,
    key: torch.Tensor,
    bank: Bank,
    positives: Positives,
    *,
    view: str | None = None,
    temperature: float = 0.07,
    reduction: Reduction = "logsumexp",
    self_positive: Literal["always", "never"] | float = "always",
    siblings: Siblings = "positive",
    query_video_id: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Contrast each query with its own key and its positives against all keys of the bank.

    Scores are ``query . x / temperature`` over x in {own key} + bank. P is the own key (unless dropped), the mined
    positives, and siblings where they count as positives. Gradients flow to `query` and `key`, never to the bank.

    Args:
        query: (B, D).
        key: (B, D), each query's own key.
        bank: the keys; `view` names which of its views, and may be left out where it has one.
        positives: from `mine` on the same bank; -1 is no member, duplicates count once.
        view: the bank's view; another view than the query's own gives cross-view pairs.
        temperature: divides every score.
        reduction: ``"logsumexp"``: LSE_all - LSE_P (MI-InfoNCE); ``"mean_log"``: LSE_all - mean_P (SupCon-out).
        self_positive: ``"always"``, ``"never"``, or the probability with which the own key leaves P (never the
            denominator) where P has another member.
        siblings: keys of the query's own video: ``"positive"``, ``"ignore"`` (in neither sum) or ``"negative"``.
        query_video_id: (B,), needed to know siblings; without it there are none.
        generator: draws which own keys are dropped.

    Returns:
        Scalar mean over the queries whose P is not empty; 0 where all are.

    Raises:
        InvalidInput: an argument is wrong.
        StaleBank: `bank` is a queue's snapshot that has been overwritten.

    Source: Wu et al., CVPRW 2022, equation 2; Han et al., NeurIPS 2020 (CoCLR), equation 3; Khosla et al., NeurIPS
        2020.
    """
    bank.ensure_fresh()
    if view is None:
        if len(bank.views) != 1:
            raise InvalidInput(f"view: expected one of {', '.join(bank.views)}, got none")
        view = bank.views[0]
    keys = torch.as_tensor(bank.keys[view]).to(query.dtype)
    scores = torch.cat([(query * key).sum(1, keepdim=True), query @ keys.T], 1) / temperature
    member = torch.zeros_like(scores, dtype=torch.bool)
    mined = torch.as_tensor(positives.index, device=query.device)
    rows = torch.arange(len(query), device=query.device)[:, None].expand_as(mined)
    member[rows[mined >= 0], mined[mined >= 0] + 1] = True
    if query_video_id is not None:
        own = torch.as_tensor(query_video_id)[:, None] == torch.as_tensor(bank.video_id)[None]
        if siblings == "positive":
            member[:, 1:] |= own
        elif siblings == "ignore":
            member[:, 1:] &= ~own
            scores = torch.cat([scores[:, :1], scores[:, 1:].masked_fill(own, -torch.inf)], 1)
        else:
            member[:, 1:] &= ~own
    member[:, 0] = _own_key_kept(self_positive, member[:, 1:].any(1), generator)
    counted = member.any(1)
    if reduction == "logsumexp":
        reached = torch.logsumexp(scores.masked_fill(~member, -torch.inf), 1)
    else:
        reached = scores.masked_fill(~member, 0).sum(1) / member.sum(1).clamp(min=1)
    each = torch.logsumexp(scores, 1) - torch.where(counted, reached, 0)
    return torch.where(counted, each, 0).sum() / counted.sum().clamp(min=1)


def _own_key_kept(
    self_positive: Literal["always", "never"] | float, others: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """(B,) bool: whether the own key is in P, given whether P has another member."""
    if self_positive == "always":
        return torch.ones_like(others)
    if self_positive == "never":
        return torch.zeros_like(others)
    if not 0 <= self_positive <= 1:
        raise InvalidInput(f"self_positive: expected 'always', 'never' or a probability, got {self_positive}")
    drop = torch.rand(others.shape, generator=generator, device=others.device) < self_positive
    return ~(drop & others)


def mine_and_contrast(
    plan: CascadePlan,
    queries: Mapping[str, Any],
    key: torch.Tensor,
    bank: Bank,
    *,
    view: str,
    exclude: object = None,
    temperature: float = 0.07,
    reduction: Reduction = "logsumexp",
    self_positive: Literal["always", "never"] | float = "always",
    siblings: Siblings = "positive",
    query_video_id: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Positives, torch.Tensor]:
    """`mine`, then `multi_positive_nce` of ``queries[view]`` with what was found; equal to the two calls.

    Args:
        plan: the stages.
        queries: view to features (B, D_view); gradients flow to ``queries[view]``.
        key: (B, D), each query's own key in `view`.
        bank: the keys.
        view: the view that is trained.
        exclude: as in `mine`.
        temperature: as in `multi_positive_nce`, and so are the options after it.
        reduction: see there.
        self_positive: see there.
        siblings: see there.
        query_video_id: see there.
        generator: see there.
    """
    found = mine(plan, {name: value.detach() for name, value in queries.items()}, bank, exclude)
    loss = multi_positive_nce(
        queries[view],
        key,
        bank,
        found,
        view=view,
        temperature=temperature,
        reduction=reduction,
        self_positive=self_positive,
        siblings=siblings,
        query_video_id=query_video_id,
        generator=generator,
    )
    return found, loss

"""The loss as an operator: one pass over the keys in tiles gives the losses and their gradients.

As in attention, a running softmax over the keys also sums the keys themselves, weighted: that sum is the query's
gradient, so the backward pass only scales it. Memory is O(B D + members of P + tile), whatever K: no (B, K) array
exists.

Where P holds nearly all of the mass, loss and gradient are small differences of large numbers. So the members of P are
kept out of the running sums: with N everything else, the loss is log(1 + exp(LSE_N - LSE_P)), a score of N has the
gradient softmax over all, and one of P minus its softmax within P times N's share of the mass. Nothing cancels.

The operator is `torch.ops.cascade_engine.nce`, known to autograd and to `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE_VALUES = 1 << 19  # scores held at a time, 2 MiB; 2^18 to 2^20 were equally fast
GATHERED_VALUES = 1 << 19  # values of the rows of P's keys gathered at a time


@torch.library.custom_op("cascade_engine::nce", mutates_args=())
def nce(
    query: Tensor,  # (B, D) float32 or float64
    own: Tensor,  # (B,) score of each query's own key, divided by the temperature
    keys: Tensor,  # (K, D), any float type
    slot: Tensor,  # (M,) members of P: slots, ascending
    row: Tensor,  # (M,) and the query each belongs to; pairs are distinct and no siblings
    near: Tensor,  # (H,) slots of keys that are a sibling of some query, ascending
    query_video: Tensor,  # (B,) read where H > 0
    key_video: Tensor,  # (K,) read where H > 0
    drop: Tensor,  # (B,) bool: the own key leaves P where P has another member
    temperature: float,
    own_positive: bool,
    ignore_siblings: bool,
    mean_log: bool,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of each query (B,) float64, its gradients by query (B, D) and own score (B,), members of P but the own key
    (B,).

    A query whose P is empty has loss 0. Siblings are members of P, or in neither sum with `ignore_siblings`; for
    siblings that are plain negatives `near` is empty. Without `differentiate` the gradients are empty.
    """
    rest = _Rest(query, own, differentiate)
    inside = _Members()
    with torch.autocast(query.device.type, enabled=False):  # the products are of the query's own type
        for tile in _tiles(query, keys, slot, row, near, query_video, key_video, temperature):
            inside.take(tile, tile.row, tile.column)
            if ignore_siblings:
                tile.scores[tile.sibling_row, tile.sibling_column] = -torch.inf
            else:
                inside.take(tile, tile.sibling_row, tile.sibling_column)
            rest.add(tile.scores, tile.keys)
        who, where, score = inside.lists(row, own)
        mine = own.double()
        count = torch.bincount(who, minlength=len(own))
        kept = own_positive & ~(drop & (count > 0))
        size = (count + kept).double()
        lse_rest = rest.value(torch.where(kept, -torch.inf, mine))
        lse_in = _lse(who, score, torch.where(kept, mine, -torch.inf))
        lse = torch.logaddexp(lse_rest, lse_in)
        if mean_log:
            mean = torch.where(kept, mine, 0).index_add_(0, who, score) / size
            each = lse - mean
        else:
            each = torch.logaddexp(lse_rest - lse_in, torch.zeros_like(lse))
        each = torch.where(size > 0, each, 0)
        if not differentiate:
            return each, query.new_empty(0), query.new_empty(0), count

        def weight(values: Tensor, of: Tensor | slice) -> Tensor:
            """The gradients of the scores of members of P."""
            if mean_log:
                return torch.exp(values - lse[of]) - 1 / size[of]
            return -torch.exp(values - lse_in[of]) * torch.sigmoid(lse_rest - lse_in)[of]

        to_query = rest.direction.mul_(torch.exp(rest.top - lse).to(query.dtype)[:, None])
        some = max(1, GATHERED_VALUES // max(1, query.shape[1]))
        for start in range(0, len(who), some):
            part = slice(start, start + some)
            rows = keys[where[part]].to(query.dtype)
            to_query.index_add_(0, who[part], rows.mul_(weight(score[part], who[part]).to(query.dtype)[:, None]))
        to_query.div_(temperature)[size == 0] = 0
        to_own = torch.where(kept, weight(mine, slice(None)), torch.exp(mine - lse))
    return each, to_query, torch.where(size > 0, to_own, 0).to(own.dtype), count


@nce.register_fake
def _(query: Tensor, own: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    each, count = torch.empty_like(own, dtype=torch.float64), torch.empty_like(own, dtype=torch.int64)
    if not rest[-1]:
        return each, query.new_empty(0), query.new_empty(0), count
    return each, torch.empty_like(query), torch.empty_like(own), count


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, to_query, to_own, count = output
    ctx.mark_non_differentiable(to_query, to_own, count)
    ctx.save_for_backward(to_query, to_own)
    ctx.differentiated = inputs[-1]


def _differentiate(ctx: Any, grad: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.differentiated:
        raise RuntimeError("nce: asked for gradients of a call without `differentiate`")
    to_query, to_own = ctx.saved_tensors
    grad = grad.to(to_own.dtype)
    return (grad[:, None] * to_query, grad * to_own, *[None] * 12)


nce.register_autograd(_differentiate, setup_context=_remember)


@dataclass(kw_only=True)
class _Tile:
    """The scores (B, T) of a run of keys (T, D) from slot `first` on, and where members of P and siblings are in it."""

    first: int
    scores: Tensor
    keys: Tensor
    row: Tensor
    column: Tensor
    sibling_row: Tensor
    sibling_column: Tensor


def _tiles(
    query: Tensor,
    keys: Tensor,
    slot: Tensor,
    row: Tensor,
    near: Tensor,
    query_video: Tensor,
    key_video: Tensor,
    temperature: float,
) -> Iterator[_Tile]:
    """Run over the keys; the scores of all tiles share one buffer."""
    b, k = len(query), len(keys)
    width = min(k, max(64, TILE_VALUES // max(1, b)))
    edges = torch.arange(0, k + width, max(1, width), device=query.device)
    member_at, near_at = (torch.searchsorted(each, edges).tolist() for each in (slot, near))
    buffer = query.new_empty(b * width)
    none = row[:0]
    for number in range(len(edges) - 1):
        first, last = number * width, min(k, (number + 1) * width)
        part = keys[first:last].to(query.dtype)
        scores = torch.mm(query, part.T, out=buffer[: b * (last - first)].view(b, last - first)).div_(temperature)
        inside = slice(member_at[number], member_at[number + 1])
        close = near[near_at[number] : near_at[number + 1]]
        sibling_row = sibling_column = none
        if len(close):
            sibling_row, which = torch.nonzero(query_video[:, None] == key_video[close], as_tuple=True)
            sibling_column = close[which] - first
        yield _Tile(
            first=first,
            scores=scores,
            keys=part,
            row=row[inside],
            column=slot[inside] - first,
            sibling_row=sibling_row,
            sibling_column=sibling_column,
        )


class _Rest:
    """A running softmax over what is not in P: the log-sum-exp of its scores, and its keys summed by their weights.

    Weights are relative to `top`, the largest score so far or the own key's; their sum is kept in float64.
    """

    def __init__(self, query: Tensor, own: Tensor, differentiate: bool) -> None:
        self.top, self.sum = own.clone(), torch.zeros_like(own, dtype=torch.float64)
        self.direction = torch.zeros_like(query) if differentiate else None

    def add(self, scores: Tensor, keys: Tensor) -> None:
        """Take in scores (B, T), which are overwritten, -inf for what does not count, and their keys (T, D)."""
        if not scores.shape[1]:
            return
        top = torch.maximum(self.top, scores.amax(1))
        shrink = torch.exp(self.top.double() - top)
        weight = scores.sub_(top[:, None]).exp_()
        self.top, self.sum = top, self.sum.mul_(shrink).add_(weight.sum(1))
        if self.direction is not None:
            self.direction.mul_(shrink.to(weight.dtype)[:, None]).addmm_(weight, keys)

    def value(self, also: Tensor) -> Tensor:
        """The log-sum-exp (B,) float64 with one more score for each query, -inf for none."""
        return torch.logaddexp(self.top.double() + self.sum.log(), also)


class _Members:
    """The members of P but own keys, as lists of (query, slot, score)."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(self, tile: _Tile, row: Tensor, column: Tensor) -> None:
        """Move the scores at (row, column) of a tile into P: -inf is left in their place."""
        if len(row):
            self.found.append((row, column + tile.first, tile.scores[row, column].double()))
            tile.scores[row, column] = -torch.inf

    def lists(self, row: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(M,) queries, slots, and scores in float64."""
        who, where, score = zip((row[:0], row[:0], own[:0].double()), *self.found, strict=True)
        return torch.cat(who), torch.cat(where), torch.cat(score)


def _lse(row: Tensor, score: Tensor, also: Tensor) -> Tensor:
    """(B,) log-sum-exp of the scores (M,) of each row, `also` (B,) among them; -inf where there is none."""
    top = also.scatter_reduce(0, row, score, "amax")
    start = torch.where(also > -torch.inf, torch.exp(also - top), 0)
    return top + start.index_add_(0, row, torch.exp(score - top[row])).log()

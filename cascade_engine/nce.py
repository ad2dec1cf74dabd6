"""The loss as an operator: tiles over the keys, an online log-sum-exp, scores recomputed in the backward pass.

Memory is O(B D + tile), whatever K: no (B, K) array exists. The scores of the members of P are read from the same tile
that the denominator sums, and their gradients cancel there, before anything is multiplied by the keys; that is what
keeps the error at plain torch's where P holds nearly all of the mass.

The operator is in `torch.ops.cascade_engine`: `nce` and `nce_backward`, known to autograd and to `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE_VALUES = 1 << 19  # scores held at a time, 2 MiB; 2^18 to 2^20 were equally fast


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of each query (B,) float64, LSE over all (B,), LSE or mean over P (B,), members of P but the own key (B,).

    A query whose P is empty has loss 0. Siblings are members of P, or in neither sum with `ignore_siblings`; for
    siblings that are plain negatives `near` is empty.
    """
    with _exact_products(query):
        total = _Online(own)
        members = _Members(own, mean_log)
        for tile in _tiles(query, keys, slot, row, near, query_video, key_video, temperature):
            if ignore_siblings:
                tile.scores[tile.sibling_row, tile.sibling_column] = -torch.inf
            else:
                members.add(tile.sibling_row, tile.scores[tile.sibling_row, tile.sibling_column])
            members.add(tile.row, tile.scores[tile.row, tile.column])
            total.add(tile.scores)
    kept = own_positive & ~(drop & (members.count > 0))
    lse = total.value()
    reached = members.value(own, kept)
    each = torch.where(kept | (members.count > 0), lse - reached, 0)
    return each, lse.to(own.dtype), reached.to(own.dtype), members.count


@nce.register_fake
def _(query: Tensor, own: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    each, count = torch.empty_like(own, dtype=torch.float64), torch.empty_like(own, dtype=torch.int64)
    return each, torch.empty_like(own), torch.empty_like(own), count


@torch.library.custom_op("cascade_engine::nce_backward", mutates_args=())
def nce_backward(
    grad: Tensor,  # (B,) float64, of the losses
    lse: Tensor,  # (B,) from the forward pass, and so are the next two
    reached: Tensor,
    count: Tensor,
    query: Tensor,  # as in the forward pass, and so is what follows
    own: Tensor,
    keys: Tensor,
    slot: Tensor,
    row: Tensor,
    near: Tensor,
    query_video: Tensor,
    key_video: Tensor,
    drop: Tensor,
    temperature: float,
    own_positive: bool,
    ignore_siblings: bool,
    mean_log: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the query (B, D) and of the own key's score (B,): g (softmax over all - weight in P)."""
    kept = own_positive & ~(drop & (count > 0))
    size = count + kept
    grad = torch.where(size > 0, grad, 0).to(own.dtype)
    share = grad / size.clamp(min=1)

    def in_members(rows: Tensor, scores: Tensor) -> Tensor:
        return share[rows] if mean_log else grad[rows] * torch.exp(scores - reached[rows])

    to_query = torch.zeros_like(query)
    with _exact_products(query):
        for tile in _tiles(query, keys, slot, row, near, query_video, key_video, temperature):
            weight = tile.scores
            taken = in_members(tile.row, weight[tile.row, tile.column])
            of_siblings = in_members(tile.sibling_row, weight[tile.sibling_row, tile.sibling_column])
            weight.sub_(lse[:, None]).exp_().mul_(grad[:, None])
            weight.index_put_((tile.row, tile.column), -taken, accumulate=True)
            if ignore_siblings:
                weight[tile.sibling_row, tile.sibling_column] = 0
            else:
                weight.index_put_((tile.sibling_row, tile.sibling_column), -of_siblings, accumulate=True)
            to_query.addmm_(weight, tile.keys)
    everyone = torch.arange(len(own), device=own.device)
    to_own = grad * torch.exp(own - lse) - torch.where(kept, in_members(everyone, own), 0)
    return to_query.div_(temperature), to_own


@nce_backward.register_fake
def _(
    grad: Tensor, lse: Tensor, reached: Tensor, count: Tensor, query: Tensor, own: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(own)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, lse, reached, count = output
    ctx.mark_non_differentiable(lse, reached, count)
    ctx.save_for_backward(lse, reached, count, *inputs[:9])
    ctx.options = inputs[9:]


def _differentiate(ctx: Any, grad: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    to_query, to_own = nce_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (to_query, to_own, *[None] * 11)


nce.register_autograd(_differentiate, setup_context=_remember)


@dataclass(kw_only=True)
class _Tile:
    """The scores (B, T) of a run of keys (T, D), and where members of P and siblings are in it."""

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
            scores=scores,
            keys=part,
            row=row[inside],
            column=slot[inside] - first,
            sibling_row=sibling_row,
            sibling_column=sibling_column,
        )


class _Online:
    """A running log-sum-exp per query, that begins with the own key's score; the sum is kept in float64."""

    def __init__(self, own: Tensor) -> None:
        self.top, self.sum = own.clone(), torch.ones_like(own, dtype=torch.float64)

    def add(self, scores: Tensor) -> None:
        """Take in scores (B, T), which are overwritten."""
        if not scores.shape[1]:
            return
        top = torch.maximum(self.top, scores.amax(1))
        self.sum *= torch.exp((self.top - top).double())
        self.sum += scores.sub_(top[:, None]).exp_().sum(1)
        self.top = top

    def value(self) -> Tensor:
        """(B,) float64."""
        return self.top.double() + self.sum.log()


class _Members:
    """The running log-sum-exp, or mean, of the scores of P but the own key's, in float64."""

    def __init__(self, own: Tensor, mean: bool) -> None:
        self.mean = mean
        self.count = torch.zeros_like(own, dtype=torch.int64)
        self.top = torch.full_like(own, -torch.inf, dtype=torch.float64)
        self.sum = torch.zeros_like(self.top)

    def add(self, rows: Tensor, scores: Tensor) -> None:
        """Take in one score for each of `rows`, which may repeat."""
        if not len(rows):
            return
        values = scores.double()
        self.count.index_add_(0, rows, torch.ones_like(rows))
        if self.mean:
            self.sum.index_add_(0, rows, values)
            return
        top = self.top.scatter_reduce(0, rows, values, "amax")
        self.sum *= torch.where(top > -torch.inf, torch.exp(self.top - top), 0)
        self.sum.index_add_(0, rows, torch.exp(values - top[rows]))
        self.top = top

    def value(self, own: Tensor, kept: Tensor) -> Tensor:
        """(B,) float64 over P, the own key's score included where it is kept; anything where P is empty."""
        mine = own.double()
        if self.mean:
            return (self.sum + torch.where(kept, mine, 0)) / (self.count + kept).clamp(min=1)
        found = self.top + self.sum.log()
        return torch.where(kept, torch.logaddexp(found, mine), found)


def _exact_products(query: Tensor) -> torch.autocast:
    """No autocast within: the products are of `query`'s own type."""
    return torch.autocast(query.device.type, enabled=False)

"""The loss as an operator: one pass over the keys in tiles gives the loss and its gradients.

As in attention, a running softmax over the keys also sums the keys themselves, weighted: that sum is the query's
gradient, so the backward pass only scales it. Memory is O(B D + members of P + tile), whatever K: no (B, K) array
exists.

Where P holds nearly all of the mass, loss and gradient are small differences of large numbers. So the members of P are
kept out of the running sums: with N everything else, the loss is log(1 + exp(LSE_N - LSE_P)), a score of N has the
gradient softmax over all, and one of P minus its softmax within P times N's share of the mass. Nothing cancels.

The operator is `torch.ops.cascade_engine.nce`, known to autograd and to `torch.compile`. Float32 queries take one call
of C++ on a CPU, and on a GPU one launch of a fused kernel where the CUDA backend is there; others torch products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cascade_engine.errors import InvalidInput
from cascade_engine.kernels import cpu, cuda
from cascade_engine.tensor import to_host

SIBLINGS = ("negative", "ignore", "positive")  # the kernels number them so
TILE_VALUES = 1 << 19  # scores held at a time, 2 MiB; 2^18 to 2^20 were equally fast
GATHERED_VALUES = 1 << 19  # values of the rows of P's keys gathered at a time


class NceCall(NamedTuple):
    """The operator's arguments.

    Args:
        query: (B, D) float32 or float64.
        own: (B, D), each query's own key, of the same type.
        keys: (K, D), any float type.
        mined: (B, k) int64 slots; -1 is none, duplicates count once, siblings are siblings first.
        query_video: (B,) int64 ids that make keys of the same id siblings, or (0,): there are none.
        key_video: (K,) int64, or (0,).
        siblings: what they are, as a place in SIBLINGS.
        drop: (B,) bool: the own key leaves P where P has another member; or (0,): nowhere.
        temperature: what scores are divided by.
        own_positive: the own key is a member of P.
        mean_log: the loss is the mean of the members' logarithms, not that of their sum.
        for_query: the gradient by `query` is wanted.
        for_own: that by `own`.
    """

    query: Tensor
    own: Tensor
    keys: Tensor
    mined: Tensor
    query_video: Tensor
    key_video: Tensor
    siblings: int
    drop: Tensor
    temperature: float
    own_positive: bool
    mean_log: bool
    for_query: bool
    for_own: bool


@torch.library.custom_op("cascade_engine::nce", mutates_args=())
def nce(
    query: Tensor,
    own: Tensor,
    keys: Tensor,
    mined: Tensor,
    query_video: Tensor,
    key_video: Tensor,
    siblings: int,
    drop: Tensor,
    temperature: float,
    own_positive: bool,
    mean_log: bool,
    for_query: bool,
    for_own: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean loss () over the queries whose P has a member, what it was divided by (), and gradients; of their type.

    0, divided by 1, where every P is empty. The gradients by `query` and `own` are of each query's own loss, so that
    their bits do not depend on the rest of the batch; one that is not asked for is (0,).

    Raises:
        InvalidInput: on a CPU, a slot of `mined` is not one of the keys'.
    """
    tensors = (query, own, keys, mined, query_video, key_video, siblings, drop)
    return _run(NceCall(*tensors, temperature, own_positive, mean_log, for_query, for_own))


def _run(call: NceCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device = call.query.device.type
    stored = call.query.dtype == torch.float32 and call.keys.dtype != torch.float64
    if stored and device == "cpu" and cpu.unavailable() is None:
        return _on_cpu(call)
    if stored and device == "cuda" and cuda.unavailable() is None:
        return mean_of(cuda.engine().contrast, call)
    if device == "cpu":
        _require_slots(call.mined, call.keys)
    with torch.autocast(device, enabled=False):  # the products are of the query's own type
        return mean_of(_by_query, call)


@nce.register_fake
def _(query: Tensor, own: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def gradient(by: Tensor, wanted: bool) -> Tensor:
        return torch.empty_like(by, memory_format=torch.contiguous_format) if wanted else by.new_empty(0)

    return query.new_empty(()), query.new_empty(()), gradient(query, rest[-2]), gradient(own, rest[-1])


def nce_now(fresh: Callable[[], None], *arguments: Any) -> Tensor:
    """The operator's loss without the way through torch's dispatcher, for code that is not being compiled.

    Args:
        fresh: called before a backward pass, to raise where the keys have changed.
        arguments: the operator's.
    """
    loss: Tensor = _Now.apply(fresh, *arguments)
    return loss


class _Now(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fresh: Callable[[], None], *arguments: Any) -> Tensor:
        output = _run(NceCall(*arguments))
        ctx.fresh = fresh
        ctx.save_for_backward(*output[1:])
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.fresh()
        return (None, *_gradients(grad, ctx.needs_input_grad[1:3], *ctx.saved_tensors), *[None] * 11)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.asked_for = inputs[-2:]


def _differentiate(ctx: Any, grad: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    if any(need and not asked for need, asked in zip(needed, ctx.asked_for, strict=True)):
        raise RuntimeError("nce: asked for gradients of a call without `for_query` or `for_own`")
    return (*_gradients(grad, needed, *ctx.saved_tensors), *[None] * 11)


def _gradients(grad: Tensor, needed: Sequence[bool], divisor: Tensor, *to: Tensor) -> Iterator[Tensor | None]:
    each = grad / divisor
    return (each * gradient if need else None for need, gradient in zip(needed, to, strict=True))


nce.register_autograd(_differentiate, setup_context=_remember)


def _on_cpu(call: NceCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator in C++."""
    known = len(call.query_video) > 0
    try:
        found = cpu.contrast(
            call.query.detach().contiguous().numpy(),
            call.own.detach().contiguous().numpy(),
            to_host(call.keys, "keys"),
            call.mined.contiguous().numpy(),
            call.query_video.contiguous().numpy() if known else None,
            call.key_video.contiguous().numpy() if known else None,
            call.siblings,
            call.drop.contiguous().numpy() if len(call.drop) else None,
            temperature=call.temperature,
            own_positive=call.own_positive,
            mean_log=call.mean_log,
            for_query=call.for_query,
            for_own=call.for_own,
        )
    except IndexError:
        _require_slots(call.mined, call.keys)  # tells which
        raise
    loss, divisor, to_query, to_own = map(torch.from_numpy, found)
    return loss, divisor, to_query, to_own


def _require_slots(mined: Tensor, keys: Tensor) -> None:
    """Refuse slots that the bank does not have."""
    if mined.numel() and (largest := int(mined.max())) >= len(keys):
        raise InvalidInput(f"positives.index: expected slots under {len(keys)}, got {largest}")


def mean_of(
    contrast: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]], call: NceCall
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator by a `contrast` that gives losses (B,), gradients by query and by own score, and whose P counts.

    Waits for no GPU.
    """
    query, own = call.query, call.own
    each, to_query, to_score, counted = contrast(
        query,
        (query * own).sum(1) / call.temperature,
        call.keys,
        _distinct(call.mined, call.query_video, call.key_video),
        call.query_video,
        call.key_video,
        call.siblings,
        call.drop if len(call.drop) else call.drop.new_zeros(len(query)),
        temperature=call.temperature,
        own_positive=call.own_positive,
        mean_log=call.mean_log,
        differentiate=call.for_query or call.for_own,
    )
    divisor, to_score = counted.sum().double().clamp(min=1), to_score[:, None] / call.temperature
    return (
        (each.sum() / divisor).to(query.dtype),
        divisor.to(query.dtype),
        to_query.addcmul_(to_score, own) if call.for_query else query.new_empty(0),
        to_score * query if call.for_own else query.new_empty(0),
    )


def _distinct(mined: Tensor, query_video: Tensor, key_video: Tensor) -> Tensor:
    """The slots (B, k), each once and no siblings, the others -1."""
    index = mined.sort(1).values
    member = index >= 0
    member[:, 1:] &= index[:, 1:] != index[:, :-1]
    if len(query_video) and len(key_video):
        member &= key_video[index.clamp(min=0)] != query_video[:, None]
    return index.where(member, -1)


def _by_query(
    query: Tensor,
    own: Tensor,
    keys: Tensor,
    member: Tensor,
    query_video: Tensor,
    key_video: Tensor,
    siblings: int,
    drop: Tensor,
    *,
    temperature: float,
    own_positive: bool,
    mean_log: bool,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each query's loss (B,) float64, gradients by query (B, D) and own score (B,), whether P has a member.

    A query whose P is empty has loss 0. Without `differentiate` the gradients are empty.
    """
    slot, row, absent_slot, absent_row = _pairs(member, query_video, key_video, siblings)
    scan = _scan(query, own, keys, slot, row, absent_slot, absent_row, temperature, differentiate)
    mine, score = own.double(), scan.score
    count = torch.bincount(row, minlength=len(own))
    kept = own_positive & ~(drop & (count > 0))
    size = (count + kept).double()
    lse_rest = torch.logaddexp(scan.top.double() + scan.sum.log(), torch.where(kept, -torch.inf, mine))
    lse_in = _lse(row, score, torch.where(kept, mine, -torch.inf))
    lse = torch.logaddexp(lse_rest, lse_in)
    if mean_log:
        each = lse - torch.where(kept, mine, 0).index_add_(0, row, score) / size
        of_member, of_own = (
            torch.exp(x - at) - 1 / n for x, at, n in ((score, lse[row], size[row]), (mine, lse, size))
        )
    else:
        each = torch.logaddexp(lse_rest - lse_in, torch.zeros_like(lse))
        share = -torch.sigmoid(lse_rest - lse_in)
        of_member, of_own = torch.exp(score - lse_in[row]) * share[row], torch.exp(mine - lse_in) * share
    counted = size > 0
    each = torch.where(counted, each, 0)
    if scan.direction is None:
        return each, query.new_empty(0), query.new_empty(0), counted
    to_query = scan.direction.mul_(torch.exp(scan.top - lse).to(query.dtype)[:, None])
    _add_rows(to_query, row, keys, slot, of_member)
    to_query.div_(temperature)[~counted] = 0
    to_own = torch.where(kept, of_own, torch.exp(mine - lse))
    return each, to_query, torch.where(counted, to_own, 0).to(own.dtype), counted


def _pairs(
    member: Tensor, query_video: Tensor, key_video: Tensor, siblings: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Members of P but own keys, slots ascending and the query of each, and the same of keys that are in neither sum.

    Their numbers depend on the data.
    """
    row, column = (member >= 0).nonzero(as_tuple=True)
    slot = member[row, column]
    sibling_slot = sibling_row = none = member.new_zeros(0)
    if SIBLINGS[siblings] != "negative" and len(query_video):
        sibling_slot, sibling_row = _siblings(query_video, key_video)
    if SIBLINGS[siblings] == "positive":
        slot, row = torch.cat((slot, sibling_slot)), torch.cat((row, sibling_row))
        sibling_slot = sibling_row = none
    slot, order = slot.sort(stable=True)
    return slot, row[order], sibling_slot, sibling_row


def _siblings(query_video: Tensor, key_video: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of one video: slots of keys, ascending, and the queries each belongs to."""
    known, order = query_video.sort(stable=True)
    first = torch.searchsorted(known, key_video)
    slot = (known[first.clamp(max=len(known) - 1)] == key_video).nonzero()[:, 0]
    first = first[slot]
    count = torch.searchsorted(known, key_video[slot], right=True) - first
    ends = count.cumsum(0)
    place = torch.arange(int(count.sum()), device=slot.device) - (ends - count - first).repeat_interleave(count)
    return slot.repeat_interleave(count), order[place]


@dataclass
class _Scan:
    """What one pass over the keys gives: a running softmax of what is not in P, and the scores of what is.

    Args:
        top: (B,) what the weights are relative to: the largest score of the rest, or the own key's.
        sum: (B,) float64, of the rest's weights exp(score - top).
        direction: (B, D), the rest's keys summed by their weights, where gradients are wanted.
        score: (M,) float64, of the members of P.
    """

    top: Tensor
    sum: Tensor
    direction: Tensor | None
    score: Tensor


def _scan(
    query: Tensor,
    own: Tensor,
    keys: Tensor,
    slot: Tensor,
    row: Tensor,
    absent_slot: Tensor,
    absent_row: Tensor,
    temperature: float,
    differentiate: bool,
) -> _Scan:
    """The pass over the keys, in tiles whose scores share one buffer."""
    scan = _Scan(
        top=own.clone(),
        sum=torch.zeros_like(own, dtype=torch.float64),
        direction=torch.zeros_like(query, memory_format=torch.contiguous_format) if differentiate else None,
        score=torch.empty_like(slot, dtype=torch.float64),
    )
    b, k = len(query), len(keys)
    width = max(1, min(k, max(64, TILE_VALUES // max(1, b))))
    edges = torch.arange(0, k + width, width, device=query.device)
    member_at, absent_at = (torch.searchsorted(each, edges).tolist() for each in (slot, absent_slot))
    buffer = query.new_empty(b * width)
    for number, first in enumerate(range(0, k, width)):
        tile = keys[first : first + width].to(query.dtype)
        scores = torch.mm(query, tile.T, out=buffer[: b * len(tile)].view(b, len(tile))).div_(temperature)
        inside = slice(member_at[number], member_at[number + 1])
        at = (row[inside], slot[inside] - first)
        scan.score[inside] = scores[at].double()
        scores[at] = -torch.inf
        inside = slice(absent_at[number], absent_at[number + 1])
        scores[absent_row[inside], absent_slot[inside] - first] = -torch.inf
        _add_tile(scan, scores, tile)
    return scan


def _add_tile(scan: _Scan, scores: Tensor, keys: Tensor) -> None:
    """Take scores (B, T), -inf for what does not count, and their keys (T, D) into the sums. Scores are overwritten."""
    top = torch.maximum(scan.top, scores.amax(1))
    shrink = torch.exp(scan.top.double() - top)
    weight = scores.sub_(top[:, None]).exp_()
    scan.top, scan.sum = top, scan.sum.mul_(shrink).add_(weight.sum(1))
    if scan.direction is not None:
        scan.direction.mul_(shrink.to(weight.dtype)[:, None]).addmm_(weight, keys)


def _add_rows(to: Tensor, row: Tensor, keys: Tensor, slot: Tensor, weight: Tensor) -> None:
    """Add the keys (K, D) at `slot` (M,), times their weights (M,), to the rows `row` (M,) of `to` (B, D)."""
    some = max(1, GATHERED_VALUES // max(1, to.shape[1]))
    for part in (slice(start, start + some) for start in range(0, len(row), some)):
        to.index_add_(0, row[part], keys[slot[part]].to(to.dtype).mul_(weight[part].to(to.dtype)[:, None]))


def _lse(row: Tensor, score: Tensor, also: Tensor) -> Tensor:
    """(B,) log-sum-exp of the scores (M,) of each row, `also` (B,) among them; -inf where there is none."""
    top = also.scatter_reduce(0, row, score, "amax")
    start = torch.where(also > -torch.inf, torch.exp(also - top), 0)
    return top + start.index_add_(0, row, torch.exp(score - top[row])).log()

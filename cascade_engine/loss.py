"""The contrastive loss with several positives per query, over a bank of keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cascade_engine.bank import Bank
from cascade_engine.errors import InvalidInput
from cascade_engine.mining import Positives, mine
from cascade_engine.nce import SIBLINGS, nce, nce_now
from cascade_engine.plan import CascadePlan
from cascade_engine.tensor import device_of, dtype_name, id_vector, is_torch, like, to_host
from cascade_engine.tracing import phase

Reduction = Literal["logsumexp", "mean_log"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
Siblings = Literal["positive", "ignore", "negative"]
SelfPositive = Literal["always", "never"] | float | Tensor


def multi_positive_nce(
    query: Tensor,
    key: Tensor,
    bank: Bank,
    positives: Positives,
    *,
    view: str | None = None,
    temperature: float = 0.07,
    reduction: Reduction = "logsumexp",
    self_positive: SelfPositive = "always",
    siblings: Siblings = "positive",
    query_video_id: object = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Contrast each query with its own key and its positives against all keys of the bank.

    Scores are ``query . x / temperature`` over x in {own key} + bank. P is the own key (unless dropped), the mined
    positives, and siblings where they count as positives. Gradients flow to `query` and `key`, never to the bank.
    No (B, K) array is made. Half-precision queries are scored in float32, and so is the loss returned.

    Args:
        query: (B, D).
        key: (B, D), each query's own key.
        bank: the keys; `view` names which of its views, and may be left out where it has one.
        positives: from `mine` on the same bank; -1 is no member, duplicates count once.
        view: the bank's view; another view than the query's own gives cross-view pairs.
        temperature: divides every score.
        reduction: ``"logsumexp"``: LSE_all - LSE_P (MI-InfoNCE); ``"mean_log"``: LSE_all - mean_P (SupCon-out).
        self_positive: ``"always"``, ``"never"``, or the probability with which the own key leaves P (never the
            denominator) where P has another member; or (B,) bool, drawn before: whose own key does.
        siblings: keys of the query's own video: ``"positive"``, ``"ignore"`` (in neither sum) or ``"negative"``
            (in the denominator only); a mined sibling is a sibling first.
        query_video_id: (B,), needed to know siblings; without it there are none.
        generator: draws which own keys are dropped.

    Returns:
        Scalar mean over the queries whose P is not empty; 0 where all are.

    Raises:
        InvalidInput: an argument is wrong.
        StaleBank: `bank` is a queue's snapshot that has been overwritten, before this call or before its backward.

    Source: Wu et al., CVPRW 2022, equation 2; Han et al., NeurIPS 2020 (CoCLR), equation 3; Khosla et al., NeurIPS
        2020.
    """
    with phase("loss"):
        if not (temperature > 0 and math.isfinite(temperature)):
            raise InvalidInput(f"temperature: expected a finite number above 0, got {temperature}")
        if reduction not in REDUCTIONS:
            raise InvalidInput(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if siblings not in SIBLINGS:
            raise InvalidInput(f"siblings: expected one of {', '.join(SIBLINGS)}, got {siblings!r}")
        compiling = torch.compiler.is_compiling()
        know = torch.compiler.disable(_known) if compiling else _known  # type: ignore[no-untyped-call]
        known = know(query, key, bank, positives, view, query_video_id)
        drop = _dropped(self_positive, query, generator)
        wide = torch.promote_types(query.dtype, torch.float32)
        scored, own = (each if each.dtype == wide else each.to(wide) for each in (query, key))
        may_stay = isinstance(self_positive, Tensor) or self_positive != "never"
        kind, mean_log = SIBLINGS.index(siblings), reduction == "mean_log"
        wanted = (torch.is_grad_enabled() and each.requires_grad for each in (scored, own))
        arguments = (scored, own, *known, kind, drop, temperature, may_stay, mean_log, *wanted)
        if not compiling:
            return nce_now(bank.ensure_fresh, *arguments)
        loss: Tensor = nce(*arguments)[0]
        _watch(loss, bank)
        return loss


def _dropped(self_positive: SelfPositive, query: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B,) bool: whose own key is to leave P, should P have another member; (0,) where nobody's is."""
    if isinstance(self_positive, Tensor):
        if self_positive.shape != (len(query),) or self_positive.dtype != torch.bool:
            raise InvalidInput(f"self_positive: expected ({len(query)},) bool, got {_described(self_positive)}")
        return self_positive.to(query.device)
    if self_positive in ("always", "never"):
        return torch.empty(0, dtype=torch.bool, device=query.device)
    if isinstance(self_positive, str) or not 0 <= self_positive <= 1:
        raise InvalidInput(f"self_positive: expected 'always', 'never' or a probability, got {self_positive!r}")
    return torch.rand(len(query), generator=generator, device=query.device) < self_positive


class _Known(NamedTuple):
    """The bank's side of the operator's arguments; see `nce`."""

    keys: Tensor
    mined: Tensor
    query_video: Tensor
    key_video: Tensor


def _known(
    query: Tensor,
    key: Tensor,
    bank: Bank,
    positives: Positives,
    view: str | None,
    query_video_id: object,
) -> _Known:
    """Check the arguments. Waits for no GPU."""
    bank.ensure_fresh()
    keys = _keys(query, key, bank, view)
    index = _on(positives.index, query, "positives.index")
    if index.ndim != 2 or len(index) != len(query):
        raise InvalidInput(f"positives.index: expected ({len(query)}, k) int64, got {tuple(index.shape)}")
    if query_video_id is None:
        query_video = key_video = index.new_zeros(0)
    else:
        if bank.video_id is None:
            raise InvalidInput("query_video_id: expected a bank with video_id to know siblings, got a bank without")
        query_video = _on(query_video_id, query, "query_video_id", ids=len(query))
        if query_video.shape != (len(query),):
            raise InvalidInput(f"query_video_id: expected ({len(query)},) integers, got {tuple(query_video.shape)}")
        key_video = _on(bank.video_id, query, "bank.video_id", ids=len(bank))
    return _Known(keys, index, query_video, key_video)


def _keys(query: Tensor, key: Tensor, bank: Bank, view: str | None) -> Tensor:
    """The bank's keys in one view, on the query's device, after the shapes have been checked."""
    if view is None and len(bank.views) == 1:
        view = bank.views[0]
    if view is None or view not in bank.keys:
        raise InvalidInput(f"view: expected one of {', '.join(bank.views)}, got {repr(view) if view else 'none'}")
    width = bank.keys[view].shape[1]
    for name, value in (("query", query), ("key", key)):
        if not isinstance(value, Tensor):
            raise InvalidInput(f"{name}: expected a torch tensor (B, {width}), got {type(value).__name__}")
        if value.ndim != 2 or value.shape[1] != width or not value.is_floating_point():
            raise InvalidInput(f"{name}: expected (B, {width}) of a floating type, got {_described(value)}")
        if value.shape != query.shape or device_of(value) != bank.device:
            raise InvalidInput(f"{name}: expected {tuple(query.shape)} on {bank.device}, got {_described(value)}")
    keys = bank.keys[view]
    # `.data` does not share the version counter: a push that fills an empty slot must not stop a backward pass, and
    # one that overwrites a key of the snapshot is caught by the bank's own guard.
    found: Tensor = keys.data if is_torch(keys) else like(keys, query)
    return found


def _described(value: Tensor) -> str:
    return f"{tuple(value.shape)} {dtype_name(value)} on {value.device}"


def _on(value: Any, query: Tensor, name: str, *, ids: int | None = None) -> Tensor:
    """Integers as an int64 tensor on the query's device; `ids` says that they are so many ids."""
    if is_torch(value) and value.dtype == torch.int64 and value.device == query.device:
        return value
    if not is_torch(value):
        array = to_host(value, name) if ids is None else id_vector(value, name, ids)
        value = like(array, query) if array.dtype.kind in "iu" else array
    if not is_torch(value) or value.is_floating_point() or value.is_complex():
        raise InvalidInput(f"{name}: expected integers, got {dtype_name(value)}")
    return value.to(query.device, torch.int64)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _watch(loss: Tensor, bank: Bank) -> None:
    """Let a backward pass begin only while the bank still holds the keys that the loss was computed from."""
    if loss.requires_grad:
        loss.register_hook(lambda _: bank.ensure_fresh())  # type: ignore[no-untyped-call]


def mine_and_contrast(
    plan: CascadePlan,
    queries: Mapping[str, Any],
    key: Tensor,
    bank: Bank,
    *,
    view: str,
    exclude: object = None,
    temperature: float = 0.07,
    reduction: Reduction = "logsumexp",
    self_positive: SelfPositive = "always",
    siblings: Siblings = "positive",
    query_video_id: object = None,
    generator: torch.Generator | None = None,
) -> tuple[Positives, Tensor]:
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
    found = mine(plan, queries, bank, exclude)
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

"""The CUDA backend, bound in `cascade_engine._cuda`: torch CUDA tensors in and out, on torch's current stream.

Nothing here waits for the GPU, and all memory comes from torch's caching allocator, so calls can be captured in a CUDA
graph.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cascade_engine.bank import METRICS, Bank
from cascade_engine.errors import BackendUnavailable, InvalidInput
from cascade_engine.kernels import MineRequest, Selection, SelectRequest
from cascade_engine.kernels.cuda_tensors import (
    Answer,
    Packed,
    address,
    contiguous_rows,
    cuda_errors,
    describe,
    on_device,
    run,
    stream_of,
)
from cascade_engine.plan import FUSIONS, CascadePlan
from cascade_engine.tensor import FEATURE_DTYPES, dtype_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cascade_engine.bank import Metric

WORKSPACE_LIMIT = 1 << 30  # bytes; queries go in waves where one launch would need more
BLOCKS = 528  # of a launch over tiles of keys: four on each SM of an H100
SPLIT_KEYS = 1 << 15  # larger banks than two such splits are preselected split by split


def unavailable() -> str | None:
    """Why it cannot run here: built without CUDA, no driver, no device, a torch without CUDA."""
    try:
        native = _native()
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return "this installation was built without CUDA" if missing else f"cascade_engine._cuda: {error}"
    reason = str(native.unavailable())
    if reason:
        return reason
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} cannot use CUDA here"


def detail() -> str:
    """The devices found."""
    return ", ".join(_native().devices())


def mine(request: MineRequest) -> Selection:
    """Rank and select on the GPU."""
    return engine().mine(request)


def select(request: SelectRequest) -> Selection:
    """Select on the GPU."""
    return engine().select(request)


def engine() -> Engine:
    """The GPU's; only where `unavailable` says nothing."""
    return Engine(_native())


@cache
def _native() -> Any:
    return import_module("cascade_engine._cuda")


class Engine:
    """Requests as calls of the native module: `cascade_engine._cuda`, or its emulation in the tests."""

    def __init__(
        self,
        native: Any,
        *,
        workspace_limit: int = WORKSPACE_LIMIT,
        split_keys: int = SPLIT_KEYS,
        bounds: bool = True,
        blocks: int = BLOCKS,
    ) -> None:
        self.native, self.workspace_limit, self.split_keys, self.bounds = native, workspace_limit, split_keys, bounds
        self.blocks = blocks

    def mine(self, request: MineRequest) -> Selection:
        """Rank the bank's keys and select.

        Raises:
            InvalidInput: queries of another type than float32, float16 or bfloat16.
            BackendUnavailable: the plan has more views or stages than a launch can carry; nothing was launched.
            CudaError: a launch failed.
        """
        bank, views = request.bank, request.plan.views
        for view in views:
            if dtype_name(request.queries[view]) not in FEATURE_DTYPES:
                got = dtype_name(request.queries[view])
                raise InvalidInput(f'queries["{view}"]: expected float32, float16 or bfloat16, got {got}')
        queries = [contiguous_rows(request.queries[view]) for view in views]
        keys = [contiguous_rows(bank.keys[view]) for view in views]
        stages = self._stages(request.plan, request.counts)
        out = Answer(queries[0], request.counts, trace=request.trace)
        needs_all_scores = request.trace or any(s.score.fusion in ("zsum", "rrf") for s in request.plan.stages)
        device = queries[0].device
        video = request.exclude.video_id
        query_video = None if video is None else video.to(device).long().contiguous()
        key_video = None if query_video is None or bank.video_id is None else bank.video_id.contiguous()
        mask = None if request.exclude.mask is None else request.exclude.mask.contiguous()
        if out.empty:
            return out.selection()
        by_bounds = self.bounds and not needs_all_scores and self._bounds_fit(keys, device)
        problem = self.native.Mine(
            stages=stages,
            queries=[describe(each) for each in queries],
            keys=[describe(each) for each in keys],
            packed=[self._packed(bank, view).addresses() if by_bounds else (0, 0, 0) for view in views],
            metric=METRICS.index(bank.metric),
            key_video=address(key_video),
            query_video=address(query_video),
            mask=address(mask),
            **out.addresses(),
            workspace_limit=self.workspace_limit,
            split_keys=self.split_keys,
            blocks=self.blocks,
        )
        run(problem, device)
        return out.selection()

    def select(self, request: SelectRequest) -> Selection:
        """Select from given similarities; raises as `mine` does."""
        scores = [contiguous_rows(request.similarities[view]) for view in request.plan.views]
        stages = self._stages(request.plan, request.counts)
        out = Answer(scores[0], request.counts, trace=request.trace)
        mask = None if request.exclude.mask is None else request.exclude.mask.contiguous()
        if out.empty:
            return out.selection()
        problem = self.native.Select(
            stages=stages,
            scores=[describe(each) for each in scores],
            mask=address(mask),
            **out.addresses(),
            workspace_limit=self.workspace_limit,
        )
        run(problem, scores[0].device)
        return out.selection()

    def push(
        self,
        keys: Mapping[str, tuple[Any, Any, Packed | None]],
        columns: Sequence[tuple[Any, Any]],
        *,
        metric: Metric,
        cursor: int,
        normalise: bool,
    ) -> None:
        """Write a batch into a key queue's ring, packing it where its views have been searched: one launch for 8 views.

        Args:
            keys: view to a batch (n, D), its ring (size, D), both of the types of features, and what has been packed of
                the ring, or None. Row i of the batch goes to slot (cursor + i) mod size; of more rows than slots the
                last ones stay.
            columns: batches (n,) int64, or None for -1, and their rings (size,).
            metric: of the ring's banks.
            cursor: the slot of the batch's first key.
            normalise: scale each key to unit length.

        Raises:
            CudaError: a launch failed.
        """
        views = [(contiguous_rows(batch), ring, packed) for batch, ring, packed in keys.values()]
        device = views[0][1].device
        given = [(None if batch is None else batch.contiguous(), ring) for batch, ring in columns]
        with on_device(device), cuda_errors():
            for start in range(0, len(views), self.native.MAX_VIEWS):
                self.native.push(
                    views=[
                        (describe(batch), describe(ring), (0, 0, 0) if packed is None else packed.addresses())
                        for batch, ring, packed in views[start : start + self.native.MAX_VIEWS]
                    ],
                    columns=[] if start else [(address(batch), address(ring)) for batch, ring in given],
                    metric=METRICS.index(metric),
                    cursor=cursor,
                    normalise=normalise,
                    stream=stream_of(device),
                )

    def contrast(
        self,
        query: Any,
        own: Any,
        keys: Any,
        member: Any,
        query_video: Any,
        key_video: Any,
        siblings: int,
        drop: Any,
        *,
        temperature: float,
        own_positive: bool,
        mean_log: bool,
        differentiate: bool,
    ) -> tuple[Any, Any, Any, Any]:
        """The operator of `cascade_engine.nce` in one launch; waits for nothing.

        Args:
            query: (B, D) float32.
            own: (B,) float32.
            keys: (K, D).
            member: (B, k) int64.
            query_video: (B,) int64, or (0,).
            key_video: (K,) int64, or (0,).
            siblings: as the operator's, and so are the options after it.
            drop: (B,) bool.
            temperature: see there.
            own_positive: see there.
            mean_log: see there.
            differentiate: see there.

        Raises:
            CudaError: the launch failed.
        """
        import torch

        loss = torch.empty(len(query), dtype=torch.float64, device=query.device)
        counted = torch.empty(len(query), dtype=torch.bool, device=query.device)
        to_query, to_own = query.new_empty((len(query) if differentiate else 0, query.shape[1])), query.new_empty(0)
        if differentiate:
            to_own = torch.empty_like(own, memory_format=torch.contiguous_format)
        if len(query):
            query, keys = contiguous_rows(query), contiguous_rows(keys)
            own, drop, member = own.contiguous(), drop.contiguous(), member.contiguous()
            ids = [each.contiguous() if len(query_video) else None for each in (query_video, key_video)]
            problem = self.native.Contrast(
                queries=describe(query),
                keys=describe(keys),
                own=address(own),
                members=address(member),
                width=member.shape[1],
                query_video=address(ids[0]),
                key_video=address(ids[1]),
                siblings=siblings,
                drop=address(drop),
                temperature=temperature,
                own_positive=own_positive,
                mean_log=mean_log,
                loss=address(loss),
                counted=address(counted),
                to_query=address(to_query) if differentiate else 0,
                to_own=address(to_own) if differentiate else 0,
                blocks=self.blocks,
            )
            run(problem, query.device)
        return loss, to_query if differentiate else query.new_empty(0), to_own, counted

    def _bounds_fit(self, keys: Sequence[Any], device: Any) -> bool:
        """Whether the device has room for bounds on views so wide; wider ones need not be packed."""
        with on_device(device), cuda_errors():
            return bool(self.native.bounds_fit(max(each.shape[1] for each in keys)))

    def _packed(self, bank: Bank, view: str) -> Packed:
        """The view's keys as halves, made at the bank's first search."""
        metric = METRICS.index(bank.metric)
        return bank.prepared(purpose(view), lambda: Packed(self.native, contiguous_rows(bank.keys[view]), metric))

    def _stages(self, plan: CascadePlan, counts: Sequence[int]) -> list[tuple[list[int], int, int, bool]]:
        most_views, most_stages = self.native.MAX_VIEWS, self.native.MAX_STAGES
        if len(plan.views) > most_views or len(plan.stages) > most_stages:
            raise BackendUnavailable(
                f"backend 'cuda' cannot run this plan: expected at most {most_views} views and {most_stages} stages, "
                f"got {len(plan.views)} and {len(plan.stages)}"
            )
        return [
            (
                [plan.views.index(view) for view in stage.score.views],
                0 if stage.score.fusion is None else 1 + FUSIONS.index(stage.score.fusion),
                count,
                stage.over_bank,
            )
            for stage, count in zip(plan.stages, counts, strict=True)
        ]


def purpose(view: str) -> tuple[str, str]:
    """What a view's packed keys are kept for on their bank."""
    return "cuda", view

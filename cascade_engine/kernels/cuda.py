"""The CUDA backend, bound in `cascade_engine._cuda`: torch CUDA tensors in and out, on torch's current stream.

Nothing here waits for the GPU, and all memory comes from torch's caching allocator, so calls can be captured in a CUDA
graph.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cascade_engine.bank import METRICS, Bank
from cascade_engine.errors import BackendUnavailable, CudaError, InvalidInput
from cascade_engine.kernels import MineRequest, Selection, SelectRequest
from cascade_engine.plan import FUSIONS, CascadePlan
from cascade_engine.tensor import FEATURE_DTYPES, dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from cascade_engine.bank import Metric, Prepared

WORKSPACE_LIMIT = 1 << 30  # bytes; queries go in waves where one launch would need more
BLOCKS = 528  # of a launch over tiles of keys: four on each SM of an H100
SPLIT_KEYS = 1 << 15  # larger banks than two such splits are preselected split by split
_DTYPES = ("float32", "float16", "bfloat16", "float64")


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
        queries = [_rows(request.queries[view]) for view in views]
        keys = [_rows(bank.keys[view]) for view in views]
        stages = self._stages(request.plan, request.counts)
        out = _Answer(queries[0], request.counts, trace=request.trace)
        needs_all_scores = request.trace or any(s.score.fusion in ("zsum", "rrf") for s in request.plan.stages)
        by_bounds = self.bounds and not needs_all_scores
        video = request.exclude.video_id
        query_video = None if video is None else video.to(queries[0].device).long().contiguous()
        key_video = None if query_video is None or bank.video_id is None else bank.video_id.contiguous()
        mask = None if request.exclude.mask is None else request.exclude.mask.contiguous()
        if out.empty:
            return out.selection()
        problem = self.native.Mine(
            stages=stages,
            queries=[_describe(each) for each in queries],
            keys=[_describe(each) for each in keys],
            packed=[self._packed(bank, view).addresses() if by_bounds else (0, 0, 0) for view in views],
            metric=METRICS.index(bank.metric),
            key_video=_address(key_video),
            query_video=_address(query_video),
            mask=_address(mask),
            **out.addresses(),
            workspace_limit=self.workspace_limit,
            split_keys=self.split_keys,
            blocks=self.blocks,
        )
        _run(problem, queries[0].device)
        return out.selection()

    def select(self, request: SelectRequest) -> Selection:
        """Select from given similarities; raises as `mine` does."""
        scores = [_rows(request.similarities[view]) for view in request.plan.views]
        stages = self._stages(request.plan, request.counts)
        out = _Answer(scores[0], request.counts, trace=request.trace)
        mask = None if request.exclude.mask is None else request.exclude.mask.contiguous()
        if out.empty:
            return out.selection()
        problem = self.native.Select(
            stages=stages,
            scores=[_describe(each) for each in scores],
            mask=_address(mask),
            **out.addresses(),
            workspace_limit=self.workspace_limit,
        )
        _run(problem, scores[0].device)
        return out.selection()

    def push(
        self,
        keys: Mapping[str, tuple[Any, Any]],
        columns: Sequence[tuple[Any, Any]],
        prepared: Prepared,
        *,
        metric: Metric,
        cursor: int,
        normalise: bool,
    ) -> list[object]:
        """Write a batch into a key queue's ring, packing it where its views have been searched: one launch for 8 views.

        Args:
            keys: view to a batch (n, D) and its ring (size, D), of the types of features. Row i of the batch goes to
                slot (cursor + i) mod size; of more rows than slots the last ones stay.
            columns: batches (n,) int64, or None for -1, and their rings (size,).
            prepared: what has been made of the ring.
            metric: of the ring's banks.
            cursor: the slot of the batch's first key.
            normalise: scale each key to unit length.

        Returns:
            The purposes for which `prepared` holds the new keys already.

        Raises:
            CudaError: a launch failed.
        """
        views = list(keys)
        packed = {view: prepared.made(_purpose(view)) for view in views}
        device = keys[views[0]][1].device
        batches = {view: _rows(batch) for view, (batch, _) in keys.items()}
        given = [(None if batch is None else batch.contiguous(), ring) for batch, ring in columns]
        with _on(device), _cuda_errors():
            for start in range(0, len(views), self.native.MAX_VIEWS):
                self.native.push(
                    views=[
                        (
                            _describe(batches[view]),
                            _describe(keys[view][1]),
                            (0, 0, 0) if packed[view] is None else packed[view].addresses(),
                        )
                        for view in views[start : start + self.native.MAX_VIEWS]
                    ],
                    columns=[] if start else [(_address(batch), _address(ring)) for batch, ring in given],
                    metric=METRICS.index(metric),
                    cursor=cursor,
                    normalise=normalise,
                    stream=_stream(device),
                )
        return [_purpose(view) for view in views if packed[view] is not None]

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
            query, keys = _rows(query), _rows(keys)
            own, drop, member = own.contiguous(), drop.contiguous(), member.contiguous()
            ids = [each.contiguous() if len(query_video) else None for each in (query_video, key_video)]
            problem = self.native.Contrast(
                queries=_describe(query),
                keys=_describe(keys),
                own=_address(own),
                members=_address(member),
                width=member.shape[1],
                query_video=_address(ids[0]),
                key_video=_address(ids[1]),
                siblings=siblings,
                drop=_address(drop),
                temperature=temperature,
                own_positive=own_positive,
                mean_log=mean_log,
                loss=_address(loss),
                counted=_address(counted),
                to_query=_address(to_query) if differentiate else 0,
                to_own=_address(to_own) if differentiate else 0,
                blocks=self.blocks,
            )
            _run(problem, query.device)
        return loss, to_query if differentiate else query.new_empty(0), to_own, counted

    def _packed(self, bank: Bank, view: str) -> Packed:
        """The view's keys as halves, made at the bank's first search."""
        metric = METRICS.index(bank.metric)
        return bank.prepared(_purpose(view), lambda: Packed(self.native, _rows(bank.keys[view]), metric))

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


class Packed:
    """A view's keys as the tensor cores take them: halves, and what rounding took away."""

    def __init__(self, native: Any, keys: Any, metric: int) -> None:
        import torch

        rows, columns = keys.shape
        device = keys.device
        self.native, self.keys, self.metric = native, keys, metric
        self.halves = torch.empty((rows, native.packed_pitch(columns)), dtype=torch.float16, device=device)
        self.squares = torch.empty(rows, dtype=torch.float32, device=device)
        self.range = torch.zeros(native.PACKED_RANGE_BYTES, dtype=torch.uint8, device=device)
        self._pack(0, rows, measure=True)

    def update(self, first: int, count: int) -> None:
        """Pack rows that a key queue has overwritten; the scale stays, and longer rows only widen the bounds."""
        self._pack(first, count, measure=False)

    def _pack(self, first: int, rows: int, *, measure: bool) -> None:
        with _on(self.keys.device), _cuda_errors():
            self.native.pack(
                keys=_describe(self.keys),
                packed=self.addresses(),
                metric=self.metric,
                first=first,
                rows=rows,
                measure=measure,
                stream=_stream(self.keys.device),
            )

    def addresses(self) -> tuple[int, int, int]:
        """Where the native module finds it."""
        return _address(self.halves), _address(self.squares), _address(self.range)


class _Answer:
    """The tensors an answer is written to."""

    def __init__(self, template: Any, counts: Sequence[int], *, trace: bool) -> None:
        import torch

        rows, device = len(template), template.device
        self.empty = rows == 0 or counts[-1] == 0
        self.index = torch.empty((rows, counts[-1]), dtype=torch.int64, device=device)
        self.similarity = torch.empty((rows, counts[-1]), dtype=torch.float32, device=device)
        sizes = counts if trace else ()
        self.kept = tuple(torch.empty((rows, count), dtype=torch.int64, device=device) for count in sizes)
        self.traced = trace

    def addresses(self) -> dict[str, Any]:
        return {
            "index": _address(self.index),
            "similarity": _address(self.similarity),
            "kept": [_address(each) for each in self.kept],
        }

    def selection(self) -> Selection:
        return Selection(index=self.index, similarity=self.similarity, kept=self.kept if self.traced else None)


def _run(problem: Any, device: Any) -> None:
    """Queue a problem's kernels on torch's current stream, with workspace from torch's allocator."""
    import torch

    with _on(device):
        workspace = torch.empty(problem.workspace(), dtype=torch.uint8, device=device)
        with _cuda_errors():
            problem.run(_address(workspace), _stream(device))


@contextmanager
def _cuda_errors() -> Iterator[None]:
    """Failed launches as what the package raises."""
    try:
        yield
    except RuntimeError as error:
        raise CudaError(str(error)) from None


def _purpose(view: str) -> tuple[str, str]:
    """What a view's packed keys are kept for on their bank."""
    return "cuda", view


def _stream(device: Any) -> int:
    """The address of torch's current stream."""
    if device.type != "cuda":
        return 0
    import torch

    return int(torch.cuda.current_stream(device).cuda_stream)


def _on(device: Any) -> AbstractContextManager[Any]:
    if device.type != "cuda":
        return nullcontext()
    import torch

    return torch.cuda.device(device)


def _rows(matrix: Any) -> Any:
    """The matrix with contiguous rows."""
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def _describe(matrix: Any) -> tuple[int, int, int, int, int]:
    rows, columns = matrix.shape
    return matrix.data_ptr(), rows, columns, matrix.stride(0), _DTYPES.index(dtype_name(matrix))


def _address(tensor: Any) -> int:
    return 0 if tensor is None else int(tensor.data_ptr())

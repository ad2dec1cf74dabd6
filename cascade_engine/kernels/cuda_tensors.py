"""Torch tensors as the native CUDA module takes them: addresses, shapes, streams, and memory that outlives a call."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from cascade_engine.errors import CudaError
from cascade_engine.kernels import Selection
from cascade_engine.tensor import dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

_DTYPES = ("float32", "float16", "bfloat16", "float64")


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
        with on_device(self.keys.device), cuda_errors():
            self.native.pack(
                keys=describe(self.keys),
                packed=self.addresses(),
                metric=self.metric,
                first=first,
                rows=rows,
                measure=measure,
                stream=stream_of(self.keys.device),
            )

    def addresses(self) -> tuple[int, int, int]:
        """Where the native module finds it."""
        return address(self.halves), address(self.squares), address(self.range)


class Answer:
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
        """Where the native module writes."""
        return {
            "index": address(self.index),
            "similarity": address(self.similarity),
            "kept": [address(each) for each in self.kept],
        }

    def selection(self) -> Selection:
        """What was written."""
        return Selection(index=self.index, similarity=self.similarity, kept=self.kept if self.traced else None)


def run(problem: Any, device: Any) -> None:
    """Queue a problem's kernels on torch's current stream, with workspace from torch's allocator."""
    import torch

    with on_device(device):
        workspace = torch.empty(problem.workspace(), dtype=torch.uint8, device=device)
        with cuda_errors():
            problem.run(address(workspace), stream_of(device))


@contextmanager
def cuda_errors() -> Iterator[None]:
    """Failed launches as what the package raises."""
    try:
        yield
    except RuntimeError as error:
        raise CudaError(str(error)) from None


def stream_of(device: Any) -> int:
    """The address of torch's current stream."""
    if device.type != "cuda":
        return 0
    import torch

    return int(torch.cuda.current_stream(device).cuda_stream)


def on_device(device: Any) -> AbstractContextManager[Any]:
    """Makes a GPU the current one; nothing for the emulation's tensors."""
    if device.type != "cuda":
        return nullcontext()
    import torch

    return torch.cuda.device(device)


def contiguous_rows(matrix: Any) -> Any:
    """The matrix with contiguous rows."""
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def describe(matrix: Any) -> tuple[int, int, int, int, int]:
    """Address, rows, columns, stride and type."""
    rows, columns = matrix.shape
    return matrix.data_ptr(), rows, columns, matrix.stride(0), _DTYPES.index(dtype_name(matrix))


def address(tensor: Any) -> int:
    """Of the first element; 0 for None."""
    return 0 if tensor is None else int(tensor.data_ptr())

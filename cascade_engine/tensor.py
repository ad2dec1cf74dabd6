"""The border between frameworks: NumPy arrays and torch tensors in, the same kind out, without copies.

Inside the engine a host matrix is a NumPy array; bfloat16 travels as ``ml_dtypes.bfloat16``. torch is imported
only once a torch tensor has been seen, so the engine runs on NumPy alone.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import ml_dtypes
import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput

if TYPE_CHECKING:
    import torch

    Array: TypeAlias = np.ndarray[Any, Any] | torch.Tensor
else:
    Array: TypeAlias = Any

Host: TypeAlias = npt.NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FEATURE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}


def is_torch(value: object) -> TypeGuard[torch.Tensor]:
    """Whether `value` is a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def device_of(value: object) -> str:
    """``"cpu"`` for host data, torch's device string otherwise."""
    return str(value.device) if is_torch(value) and not value.is_cpu else "cpu"


def dtype_name(value: Array) -> str:
    """The element type's name as NumPy and torch both spell it, such as ``"float32"``."""
    return str(value.dtype).removeprefix("torch.")


def to_host(value: object, name: str) -> Host:
    """`value` as a NumPy array that shares its memory; sequences become arrays.

    Raises:
        InvalidInput: a tensor on an accelerator, or something no array can be made of.
    """
    if type(value) is np.ndarray and value.dtype != object:
        return value
    if is_torch(value):
        if not value.is_cpu:
            raise InvalidInput(f"{name}: expected data on the CPU, got a tensor on {value.device}")
        torch = sys.modules["torch"]
        value = value.detach() if value.requires_grad else value
        return value.view(torch.int16).numpy().view(BFLOAT16) if value.dtype == torch.bfloat16 else value.numpy()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"{name}: expected an array, got {type(value).__name__}: {error}") from None
    if array.dtype == object:
        raise InvalidInput(f"{name}: expected an array of numbers, got {type(value).__name__}")
    return array


def like(result: Host, template: object) -> Any:
    """`result` in the framework and on the device of `template`."""
    if not is_torch(template):
        return result
    tensor = shared(result)
    return tensor if template.device.type == "cpu" else tensor.to(template.device)


def shared(array: Host) -> torch.Tensor:
    """A tensor on the CPU of an array's memory; where that is read-only, as a mapped store's, only to be read.

    An array that tensors have no layout for (steps backwards or between elements, foreign byte order) is copied.
    """
    import torch

    if array.dtype == BFLOAT16:
        return shared(array.view(np.int16)).view(torch.bfloat16)
    if not array.dtype.isnative or any(step < 0 or step % array.itemsize for step in array.strides):
        array = np.array(array, array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Unlocked(array)))


class _Unlocked:
    """An array that cannot be written to, as one that can: tensors know no such thing, and torch warns of it."""

    def __init__(self, array: Host) -> None:
        self.array = array  # whose memory it is
        address = array.__array_interface__["data"][0]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def feature_matrix(value: object, name: str, *, columns: int | None = None) -> Host:
    """`value` as a host matrix (N, D) of a stored feature type, checked.

    Raises:
        InvalidInput: wrong rank, width or type; the message names the argument, what was expected and what came.
    """
    array = to_host(value, name)
    fits = array.ndim == 2 and array.shape[1] >= 1 and array.dtype in FEATURE_DTYPES.values()
    if not fits or (columns is not None and array.shape[1] != columns):
        want = f"(N, {columns if columns is not None else 'D'}) float32, float16 or bfloat16"
        raise InvalidInput(f"{name}: expected {want}, got {tuple(array.shape)} {array.dtype}")
    return array


def require_finite(array: Host, name: str) -> None:
    """Refuse NaN and infinity, naming the first row that holds one."""
    step = max(1, (1 << 22) // max(1, array.shape[1]))
    for start in range(0, len(array), step):
        part = array[start : start + step]
        finite = np.isfinite(part)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise InvalidInput(f"{name}: expected finite values, got {part[row, column]} in row {start + row}")


def id_vector(value: object, name: str, rows: int) -> npt.NDArray[np.int64]:
    """`value` as int64 ids (rows,).

    Raises:
        InvalidInput: not integers, or not one for each row.
    """
    array = to_host(value, name)
    if array.ndim != 1 or len(array) != rows or (array.dtype.kind not in "iu" and array.size):
        raise InvalidInput(f"{name}: expected ({rows},) integers, got {tuple(array.shape)} {array.dtype}")
    return array.astype(np.int64, copy=False)


def ids_on(device: str, value: object, name: str, rows: int) -> Any:
    """Ids (rows,) as int64 on a device: on the CPU in their own framework, elsewhere as a tensor.

    Raises:
        InvalidInput: not integers, or not one for each row.
    """
    if not is_torch(value):
        found = id_vector(value, name, rows)
        return found if device == "cpu" else shared(found).to(device)
    no_ids = value.dtype.is_floating_point or value.dtype.is_complex or dtype_name(value) == "bool"
    if value.ndim != 1 or len(value) != rows or no_ids:
        raise InvalidInput(f"{name}: expected ({rows},) integers, got {tuple(value.shape)} {dtype_name(value)}")
    return value.to(device).long()

"""Index columns: text coded as categories, and what a column looks like to its reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput
from cascade_engine.tensor import to_host

Values = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Categorical:
    """A text column as stored: one code a row, and what the codes mean. Indexing decodes.

    Args:
        codes: (n,) int32.
        categories: the texts, by code.
    """

    codes: npt.NDArray[np.int32]
    categories: tuple[str, ...]

    def __len__(self) -> int:
        """n, the number of rows."""
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Any:
        """The text of one row, or a NumPy array of the texts of several."""
        codes = self.codes[rows]
        return self._names()[codes] if isinstance(codes, np.ndarray) else self.categories[int(codes)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Values:
        """All texts as a NumPy array of fixed-width strings."""
        names: Values = self._names()[self.codes]
        return names if dtype is None else names.astype(dtype)

    def take(self, rows: Any) -> Categorical:
        """The column of some rows, still coded."""
        return Categorical(codes=self.codes[rows], categories=self.categories)

    def _names(self) -> Values:
        return np.array(self.categories, np.str_) if self.categories else np.zeros(1, "U1")


class Dictionary:
    """The categories of a text column under construction."""

    def __init__(self, categories: Sequence[str]) -> None:
        self._codes = {text: code for code, text in enumerate(categories)}

    @property
    def categories(self) -> tuple[str, ...]:
        """The texts, by code."""
        return tuple(self._codes)

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], list[str]]:
        """Codes of `texts` and the categories that are new; nothing is remembered before `accept`."""
        fresh: dict[str, int] = {}
        codes = np.empty(len(texts), np.int32)
        for row, text in enumerate(texts):
            code = self._codes.get(text)
            if code is None:
                code = fresh.setdefault(text, len(self._codes) + len(fresh))
            codes[row] = code
        return codes, list(fresh)

    def accept(self, fresh: Sequence[str]) -> None:
        """Remember new categories, which are written now."""
        for text in fresh:
            self._codes[text] = len(self._codes)


def pack(texts: Sequence[str], start: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Texts as a blob of UTF-8 and where each ends, for a blob that has `start` bytes already."""
    encoded = [text.encode() for text in texts]
    ends = start + np.cumsum([len(each) for each in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def unpack(blob: Values, ends: Values) -> tuple[str, ...]:
    """The texts that `pack` made a blob of."""
    data, edges = blob.tobytes(), [0, *ends.tolist()]
    return tuple(data[a:b].decode() for a, b in pairwise(edges))


def typed(value: object, name: str, kind: str, rows: int) -> Any:
    """A column's values checked against its type: a NumPy vector, or a list of texts.

    Raises:
        InvalidInput: another length or type; the first offending value is named.
    """
    if kind == "str":
        return _texts(value, name, rows)
    array = to_host(value, name) if not isinstance(value, int | float | bool) else np.full(rows, value)
    want = {"int": "iu", "float": "fiu", "bool": "b"}[kind]
    if array.ndim != 1 or len(array) != rows or (array.dtype.kind not in want and array.size):
        raise InvalidInput(f"{name}: expected ({rows},) {kind}, got {tuple(array.shape)} {array.dtype}")
    target = np.dtype({"int": np.int64, "float": np.float64, "bool": np.bool_}[kind])
    if array.dtype == np.uint64 and kind == "int" and array.size and array.max() > np.iinfo(np.int64).max:
        raise InvalidInput(f"{name}: expected integers that fit in 64 bits with sign, got {array.max()}")
    return array.astype(target, copy=False)


def _texts(value: object, name: str, rows: int) -> list[str]:
    if isinstance(value, str):
        return _texts([value], name, 1) * rows
    texts = value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, Sequence) else None
    if isinstance(value, Categorical):
        texts = value[:].tolist()
    if texts is None or len(texts) != rows:
        got = type(value).__name__ if texts is None else f"{len(texts)} values"
        raise InvalidInput(f"{name}: expected {rows} texts, got {got}")
    for text in set(texts):
        if not isinstance(text, str) or "\0" in text or (not text.isascii() and text != _round_trip(text)):
            raise InvalidInput(f"{name}: expected Unicode texts without NUL, got {text!r} in row {texts.index(text)}")
    return texts


def _round_trip(text: str) -> str:
    return text.encode(errors="replace").decode()

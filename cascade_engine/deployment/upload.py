"""Receiving an upload: straight into one file of our own naming, counted while it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from cascade_engine.errors import InvalidInput


class TooLarge(InvalidInput):
    """More bytes than are taken."""


async def receive(chunks: AsyncIterator[bytes], content_type: str, target: Path, limit: int) -> None:
    """Write the body of a request to `target`: the first file of a multipart form, or the body itself.

    The sender's file name is never looked at, nothing else is written anywhere, and nothing beyond `limit` is kept.

    Raises:
        TooLarge: the body is longer than `limit` bytes.
        InvalidInput: a form that is broken or holds no file, or an empty body.
    """
    kind, options = parse_options_header(content_type)
    with target.open("wb") as file:
        form = _Form(file, options.get(b"boundary", b"")) if kind == b"multipart/form-data" else None
        received = 0
        async for chunk in chunks:
            received += len(chunk)
            if received > limit:
                raise TooLarge(f"upload: expected at most {limit} bytes, got more")
            if form is None:
                file.write(chunk)
            else:
                form.feed(chunk)
        if form is not None and not form.found:
            raise InvalidInput("upload: expected a file in the form, got none")
        if not file.tell():
            raise InvalidInput("upload: expected a video, got an empty body")


class _Form:
    """Copies the first part that is a file, and skips the others."""

    def __init__(self, file: BinaryIO, boundary: bytes) -> None:
        if not boundary:
            raise InvalidInput("upload: expected a boundary in the form's content type, got none")
        self.file, self.found, self._copying = file, False, False
        self._name, self._value = b"", b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._field,
                "on_header_value": self._text,
                "on_header_end": self._header,
                "on_part_data": self._data,
                "on_part_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise InvalidInput(f"upload: expected a multipart form, got a broken one ({error})") from None

    def _begin(self) -> None:
        self._name, self._value = b"", b""

    def _field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _text(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header(self) -> None:
        if self._name.lower() == b"content-disposition" and not self.found:
            self.found = self._copying = b"filename" in parse_options_header(self._value)[1]
        self._name, self._value = b"", b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._copying:
            self.file.write(data[start:end])

    def _end(self) -> None:
        self._copying = False

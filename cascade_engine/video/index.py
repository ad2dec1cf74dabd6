"""Indexes of labelled videos: a CSV of one's own, a folder per label, or a public data set's layout as it comes."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from cascade_engine.errors import InvalidInput

log = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    f".{ending}"
    for ending in (
        *("3gp", "asf", "avi", "flv", "gif", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "mxf", "ogg"),
        *("ogv", "ts", "vob", "webm", "wmv", "y4m"),
    )
)
COLUMNS = ("path", "label", "split", "start", "end", "group")

Source = str | PathLike[str]


@dataclass(frozen=True, kw_only=True)
class VideoEntry:
    """One labelled video, or the part [start, end) of one."""

    path: Path
    video_id: int  # its place in the index
    label: str | None = None
    split: str | None = None
    start: float = 0.0  # seconds
    end: float | None = None  # seconds, exclusive; None is the video's end
    group: str | None = None  # videos cut from one recording share it


class VideoIndex:
    """A list of :class:`VideoEntry`, in a fixed order; `video_id` is the place in that list.

    Args:
        entries: they are numbered anew.
        missing: files that a label file names and that are not there.
    """

    def __init__(self, entries: Iterable[VideoEntry], *, missing: Iterable[Path] = ()) -> None:
        self.entries = tuple(replace(entry, video_id=row) for row, entry in enumerate(entries))
        self.missing = tuple(missing)
        for path in self.missing:
            log.warning("%s: named by the labels, but there is no such file", path)

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.entries)

    def __iter__(self) -> Iterator[VideoEntry]:
        """The entries in order."""
        return iter(self.entries)

    def __getitem__(self, row: int) -> VideoEntry:
        """The entry at a place."""
        return self.entries[row]

    @property
    def labels(self) -> tuple[str, ...]:
        """The different labels, sorted."""
        return tuple(sorted({entry.label for entry in self.entries if entry.label is not None}))

    @property
    def splits(self) -> tuple[str, ...]:
        """The different split names, sorted."""
        return tuple(sorted({entry.split for entry in self.entries if entry.split is not None}))

    def split(self, name: str) -> list[VideoEntry]:
        """The entries of one split; they keep their `video_id`.

        Raises:
            InvalidInput: no entry has that split.
        """
        found = [entry for entry in self.entries if entry.split == name]
        if not found:
            raise InvalidInput(f"split: expected one of {', '.join(self.splits) or 'none'}, got {name!r}")
        return found

    def difference(self, other: VideoIndex) -> str | None:
        """What `other` differs in first, as "expected ..., got ..."; None where in nothing. Paths are made absolute."""
        if len(self) != len(other):
            return f"expected {len(self)} videos, got {len(other)}"
        for mine, theirs in zip(self, other, strict=True):
            path, found = mine.path.absolute(), theirs.path.absolute()
            if path != found:
                return f"expected {path} as video {mine.video_id}, got {found}"
            for name in COLUMNS[1:]:
                if getattr(mine, name) != getattr(theirs, name):
                    return f"expected the {name} {getattr(mine, name)!r} of {path}, got {getattr(theirs, name)!r}"
        return None

    def to_csv(self, path: Source) -> None:
        """Write the index so that :meth:`from_csv` reads it back; paths under the file's folder become relative.

        Raises:
            InvalidInput: the name of a file is not UTF-8, as the table is.
        """
        path = Path(path)
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for entry in self.entries:
            file = entry.path.absolute()
            if file.is_relative_to(path.absolute().parent):
                file = file.relative_to(path.absolute().parent)
            end = "" if entry.end is None else repr(entry.end)
            start = repr(entry.start) if entry.start else ""
            writer.writerow([str(file), entry.label or "", entry.split or "", start, end, entry.group or ""])
        try:
            path.write_bytes(text.getvalue().encode())
        except UnicodeEncodeError as error:
            row = text.getvalue()[: error.start].rpartition("\n")[2] + repr(error.object[error.start])[1:-1]
            raise InvalidInput(f"{path}: expected names in UTF-8, got {row}...; rename that file") from None

    @classmethod
    def from_csv(cls, path: Source, *, root: Source | None = None, keep_missing: bool = False) -> VideoIndex:
        """Read a table with the columns path, label, split, start, end, group (only path is needed).

        Args:
            path: the CSV file, with a header line.
            root: where relative paths start; the CSV's own folder by default.
            keep_missing: keep entries whose files are gone, so that each entry keeps its number.

        Raises:
            InvalidInput: no such file, no CSV table, no path column, an unknown column, or a time that is not a number;
                the message names the line.
        """
        path = Path(path)
        base = Path(root) if root is not None else path.parent
        names, rows = _table(path)
        unknown = sorted(set(names) - set(COLUMNS))
        if "path" not in names or unknown:
            raise InvalidInput(f"{path}: expected the columns {', '.join(COLUMNS)} (path at least), got {names}")
        entries = []
        for where, row in rows:
            if None in row or not row["path"]:
                raise InvalidInput(f"{where}: expected {len(names)} fields with a path, got {list(row.values())}")
            start, end = _seconds(row.get("start"), where), _seconds(row.get("end"), where)
            if end is not None and end <= (start or 0.0):
                raise InvalidInput(f"{where}: expected an end after the start, got {start}, {end}")
            entries.append(
                VideoEntry(
                    path=base / row["path"],
                    video_id=0,
                    label=row.get("label") or None,
                    split=row.get("split") or None,
                    start=start or 0.0,
                    end=end,
                    group=row.get("group") or None,
                )
            )
        return cls(entries) if keep_missing else cls._existing(entries)

    @classmethod
    def from_folder(cls, folder: Source, *, split: str | None = None) -> VideoIndex:
        """All videos under a folder, sorted by path; the label is the folder each lies in, where there is one.

        Linked folders are looked into as others are, and give their labels by the names of their links.

        Raises:
            InvalidInput: no such folder, or no video under it.
        """
        folder = Path(folder)
        entries = []
        for file in sorted(_videos_under(folder)):
            label = file.parent.name if file.parent != folder else None
            entries.append(VideoEntry(path=file, video_id=0, label=label, split=split))
        if not entries:
            raise InvalidInput(f"{folder}: expected videos in it, found none ({', '.join(sorted(EXTENSIONS))})")
        return cls(entries)

    @classmethod
    def from_ucf101(cls, videos: Source, lists: Source, *, fold: int = 1) -> VideoIndex:
        """UCF101 as it comes: `videos`/Class/v_Class_g01_c01.avi, and in `lists` classInd.txt, trainlist01.txt, ...

        The group is the recording a video was cut from (`Class_g01`).

        Args:
            videos: the folder with a folder for each class.
            lists: the folder of the recognition task's split files.
            fold: 1, 2 or 3.

        Raises:
            InvalidInput: a list is missing, or names a class that classInd.txt does not.
        """
        videos, lists = Path(videos), Path(lists)
        numbered = _class_numbers(lists / "classInd.txt")
        known = set(numbered.values())
        entries = []
        for split in ("train", "test"):
            file = lists / f"{split}list{fold:02d}.txt"
            for line in _lines(file):
                name, _, number = line.partition(" ")
                label = name.split("/")[0]
                if label not in known or (number and numbered.get(number.strip()) != label):
                    raise InvalidInput(f"{file}: expected a class of classInd.txt, got {line!r}")
                entries.append(
                    VideoEntry(path=videos / name, video_id=0, label=label, split=split, group=ucf101_group(name))
                )
        return cls._existing(entries)

    @classmethod
    def from_hmdb51(cls, videos: Source, lists: Source, *, fold: int = 1) -> VideoIndex:
        """HMDB51 as it comes: `videos`/class/name.avi, `lists`/class_test_split1.txt with 1 train, 2 test, 0 neither.

        Args:
            videos: the folder with a folder for each class.
            lists: the folder of the split files.
            fold: 1, 2 or 3.

        Raises:
            InvalidInput: no split file of that fold, or a line that is not `name number`.
        """
        videos, lists = Path(videos), Path(lists)
        ending = f"_test_split{fold}.txt"
        files = sorted(lists.glob(f"*{ending}"))
        if not files:
            raise InvalidInput(f"{lists}: expected files named CLASS{ending}, found none")
        entries = []
        for file in files:
            label = file.name.removesuffix(ending)
            for line in _lines(file):
                name, _, mark = line.rpartition(" ")
                if not name or mark not in {"0", "1", "2"}:
                    raise InvalidInput(f"{file}: expected a file name and 0, 1 or 2, got {line!r}")
                if mark != "0":
                    split = "train" if mark == "1" else "test"
                    entries.append(VideoEntry(path=videos / label / name.strip(), video_id=0, label=label, split=split))
        return cls._existing(entries)

    @classmethod
    def from_kinetics(cls, videos: Source, tables: Source | Iterable[Source]) -> VideoIndex:
        """Kinetics as it comes: CSV files with label, youtube_id, time_start, time_end and split.

        A video is looked for under `videos`, in any of the layouts the usual downloaders write: with or without a
        folder for the split or the label (spaces kept or made underscores), named `ID_000010_000020` or `ID`. Where
        the file carries the interval in its name it is a cut already; else the interval is taken from the table.

        Raises:
            InvalidInput: a table is missing, is no CSV, or lacks a column.
        """
        videos = Path(videos)
        by_name = {file.stem: file for file in sorted(_videos_under(videos))}
        entries, missing = [], []
        for table in map(Path, [tables] if isinstance(tables, str | PathLike) else tables):
            names, rows = _table(table)
            if not {"youtube_id", "time_start", "time_end"} <= set(names):
                raise InvalidInput(f"{table}: expected youtube_id, time_start and time_end, got {names}")
            for where, row in rows:
                start, end = _seconds(row["time_start"], where), _seconds(row["time_end"], where)
                cut = f"{row['youtube_id']}_{int(start or 0):06d}_{int(end or 0):06d}"
                split = row.get("split") or table.stem
                entry = VideoEntry(path=videos, video_id=0, label=row.get("label") or None, split=split)
                if cut in by_name:
                    entries.append(replace(entry, path=by_name[cut]))
                elif row["youtube_id"] in by_name:
                    entries.append(replace(entry, path=by_name[row["youtube_id"]], start=start or 0.0, end=end))
                else:
                    missing.append(videos / f"{cut}.mp4")
        return cls(entries, missing=missing)

    @classmethod
    def _existing(cls, entries: Iterable[VideoEntry]) -> VideoIndex:
        """Only the entries whose files are there; the others are listed as missing."""
        here, missing = [], []
        for entry in entries:
            if entry.path.is_file():
                here.append(entry)
            else:
                missing.append(entry.path)
        return cls(here, missing=missing)


def ucf101_group(name: str) -> str | None:
    """The recording that `v_Class_g07_c01.avi` was cut from, `Class_g07`; None for another kind of name."""
    found = re.search(r"v_(.+_g\d+)_c\d+", name)
    return found.group(1) if found else None


def _videos_under(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise InvalidInput(f"{folder}: expected a folder of videos, found none")
    yield from _walked(folder, ())


def _walked(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Videos at any depth, linked folders included; a link to one of those `above` leads in a circle and is passed."""
    here = folder.resolve()
    if here in above:
        return
    try:
        children = list(folder.iterdir())
    except PermissionError:
        log.warning("%s: not looked into, its permissions forbid it", folder)
        return
    for child in children:
        if child.is_dir():
            yield from _walked(child, (*above, here))
        elif child.suffix.lower() in EXTENSIONS and not child.name.startswith(".") and child.is_file():
            yield child


def _table(path: Path) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """A CSV file's columns, and its rows with the place of each, `file:line`."""
    rows = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        return list(rows.fieldnames or []), [(f"{path}:{rows.line_num}", row) for row in rows]
    except csv.Error as error:
        raise InvalidInput(f"{path}:{rows.reader.line_num}: expected a CSV table ({error})") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: expected a text file, {getattr(error, 'strerror', None) or error}") from None


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def _class_numbers(file: Path) -> dict[str, str]:
    """UCF101's class index: number to class."""
    found = {}
    for line in _lines(file):
        number, _, label = line.partition(" ")
        if not number.isdecimal() or not label.strip():
            raise InvalidInput(f"{file}: expected a number and a class, got {line!r}")
        found[number] = label.strip()
    return found


def _seconds(text: str | None, where: str) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InvalidInput(f"{where}: expected seconds, got {text!r}")
    return value

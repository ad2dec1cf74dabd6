"""`FeatureStore`: clip features of several views, on disk, in phases, with atomic commits."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from cascade_engine.errors import InvalidInput, StoreError
from cascade_engine.store import changing
from cascade_engine.store.clips import ClipIndex
from cascade_engine.store.columns import Dictionary
from cascade_engine.store.creating import make_phase, make_store, read_root
from cascade_engine.store.files import Files, LocalFiles
from cascade_engine.store.ingest import Batch, check_batch
from cascade_engine.store.layout import BUILT_IN, CHUNK_BYTES, check_columns, check_phase, check_views
from cascade_engine.store.locking import Lock
from cascade_engine.store.opening import open_writer
from cascade_engine.store.phase import Phase
from cascade_engine.store.reading import StoreReader
from cascade_engine.store.record import emptied, empty_record, read_record
from cascade_engine.store.writer import DURABILITIES, Durability, PhaseWriter
from cascade_engine.tensor import id_vector, to_host


class FeatureStore(StoreReader):
    """Features of clips in several views, grouped in phases (one a model version), as plain Zarr v3 underneath.

    A phase shows its last commit and nothing else, whatever happens to its writer; readers map the files and need no
    lock. A reader keeps the commit it opened (`refresh` moves on); a writer holds its phase's lock until `close`.
    Made by `create` and `open`.
    """

    def __init__(self, path: Path, phase: str, writer: PhaseWriter | None, lock: Lock | None) -> None:
        self.path, self.phase = path, phase
        self._writer, self._lock = writer, lock
        self._snapshots: dict[str, Phase] = {}
        self._dictionaries: dict[str, Dictionary] = {}
        if writer is not None:
            held = self._at(None)
            for name, column in writer.record.columns.items():
                if column.type == "str":
                    self._dictionaries[name] = Dictionary(held.categories(column.versions[-1][1]))

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        views: Mapping[str, int],
        *,
        dtype: str | Mapping[str, str] = "float32",
        columns: Mapping[str, str] | None = None,
        phase: str = "main",
        normalise: bool = False,
        durability: Durability = "commit",
        model: str | None = None,
        preprocessing: str | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> FeatureStore:
        """Make a store with one empty phase, opened for appending.

        Args:
            path: a folder that does not exist yet.
            views: view to feature width.
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``, for all views or by view.
            columns: name to ``"int"``, ``"float"``, ``"str"`` or ``"bool"``; clip_id, video_id, start and end are
                always there.
            phase: the first phase's name.
            normalise: scale every feature to unit length on its way in.
            durability: ``"commit"``: an append that returned survives power loss. ``"group"``: appends are gathered,
                published and synced together, at the latest by `flush` and `close`. ``"none"``: an append that
                returned survives its process, not power loss.
            model: what computes the features, for the record.
            preprocessing: likewise.
            chunk_bytes: size of a chunk file, which readers of plain Zarr read as a whole.

        Raises:
            StoreError: there is something at `path`, or the disk refuses.
            InvalidInput: a view or column that cannot be.
        """
        root = Path(path)
        record = empty_record(
            phase=check_phase(phase),
            uid=uuid.uuid4().hex,
            views=check_views(views, dtype, normalise=normalise),
            columns=check_columns(columns or {}, views),
            chunk_bytes=chunk_bytes,
            model=model,
            preprocessing=preprocessing,
        )
        make_store(root, record)
        return cls.open(root, mode="a", durability=durability)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: Literal["r", "a"] = "r",
        *,
        phase: str | None = None,
        durability: Durability = "commit",
        files: Files | None = None,
    ) -> FeatureStore:
        """Open a store to read it, or to append to one phase.

        Args:
            path: the store's folder, or the URL of a published one, which is read through a local cache.
            mode: ``"r"``, or ``"a"``, which takes the phase's lock.
            phase: the phase that calls without one refer to; the store's first by default.
            durability: of a writer's commits; see `create`.
            files: the file system, for tests.

        Raises:
            NotFound: no store, or no such phase.
            StoreLocked: another process writes the phase; it is named.
            StoreError: the phase is sealed.
            SchemaMismatch: a store of another format.
        """
        if mode not in ("r", "a"):
            raise InvalidInput(f"mode: expected 'r' or 'a', got {mode!r}")
        if durability not in DURABILITIES:
            raise InvalidInput(f"durability: expected one of {', '.join(DURABILITIES)}, got {durability!r}")
        if "://" in os.fspath(path):
            return _from_afar(os.fspath(path), mode, phase)
        root = Path(path)
        default = read_root(root)
        name = phase or default
        folder = root / "phases" / check_phase(name)
        if mode == "r":
            read_record(folder)
            return cls(root, name, None, None)
        writer, lock = open_writer(folder, f"phase {name!r} of {root}", files or LocalFiles(), durability)
        try:
            return cls(root, name, writer, lock)
        except BaseException:
            writer.abandon()
            lock.release()
            raise

    def __enter__(self) -> Self:
        """The store itself; leaving closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; where an error leaves the block, what a group commit has gathered is published all the same."""
        self.close()

    def __repr__(self) -> str:
        """Where, which phase, what is in it."""
        views = ", ".join(f"{name} {dim}" for name, dim in self.views.items())
        return f"FeatureStore({str(self.path)!r}, phase={self.phase!r}, {self.rows} clips, {views})"

    def append(
        self,
        views: Mapping[str, object],
        *,
        clip_id: object,
        video_id: object,
        start: object = None,
        end: object = None,
        present: Mapping[str, object] | None = None,
        **columns: object,
    ) -> int:
        """Add clips, all views and columns in one commit, and return how many.

        Args:
            views: view to features (b, D_view), NumPy or torch. A view left out is missing for these clips, to be
                filled later.
            clip_id: (b,) integers that the phase does not have yet.
            video_id: (b,) integers.
            start: (b,) seconds; NaN where not given.
            end: (b,) seconds.
            present: view to a mask (b,) of the clips that have it; the other rows of that view are not looked at.
            **columns: every column of the store's own, (b,) each, or one text or number for all.

        Raises:
            InvalidInput: wrong shapes or types, NaN or infinity (the clip is named), a clip id that is there already.
            SchemaMismatch: a view or column the store does not have, or a column that is missing.
            StoreError: the disk is full or refuses; nothing of this batch is committed.
        """
        writer = self._writing()
        given = {"clip_id": clip_id, "video_id": video_id, "start": start, "end": end, **columns}
        index = self._at(None).clips
        if len(index) != writer.pending.rows:
            raise StoreError(f"{self.path}: an append was interrupted; open the phase again to go on")
        batch = check_batch(writer.pending, writer.next_commit, self._dictionaries, views, present or {}, given)
        _require_new(index, batch)
        with writer.transaction():
            changing.note_batch(writer, batch, self._dictionaries)
            writer.append(batch.rows, batch.clips)
        changing.accept_batch(batch, self._dictionaries)
        index.add(batch.rows["clip_id"])
        self._moved(index)
        return batch.clips

    def append_all(self, batches: Iterable[Mapping[str, Any]], sources: Mapping[str, int]) -> int:
        """Add many batches in one commit, and return how many clips.

        Args:
            batches: the arguments of `append`; features are taken as they are.
            sources: the uids of the stores that they come from and the rows of each that are in then, for `merged`.

        Raises:
            InvalidInput: a batch does not fit, or brings a clip again; nothing is committed then.
        """
        writer = self._writing()
        self.flush()
        index = ClipIndex(np.asarray(self._at(None).column("clip_id")))
        dictionaries = {name: Dictionary(each.categories) for name, each in self._dictionaries.items()}
        before = writer.record.rows
        with writer.transaction():
            for given in batches:
                views = {name: replace(view, normalised=False) for name, view in writer.pending.views.items()}
                as_is, own = replace(writer.pending, views=views), dict(given)
                values, present = own.pop("views"), own.pop("present", {})
                batch = check_batch(as_is, writer.next_commit, dictionaries, values, present, own)
                _require_new(index, batch)
                changing.note_batch(writer, batch, dictionaries)
                writer.write(batch.rows, batch.clips)
                changing.accept_batch(batch, dictionaries)
                index.add(batch.rows["clip_id"])
            writer.pending = replace(writer.pending, merged={**writer.record.merged, **sources})
            writer.publish("merge")
        self._dictionaries = dictionaries
        self._moved(index)
        return writer.record.rows - before

    @property
    def durability(self) -> Durability:
        """What a writer's commits survive; see `create`."""
        return self._writing().durability

    def like(self, path: str | os.PathLike[str], *, durability: Durability = "commit") -> FeatureStore:
        """A new, empty store with the views, types and columns of the current phase."""
        root = Path(path)
        root.parent.mkdir(parents=True, exist_ok=True)
        make_store(root, emptied(self._at(None).record))
        return FeatureStore.open(root, mode="a", durability=durability)

    def fill(self, view: str, clip_id: object, value: object, *, as_is: bool = False) -> None:
        """Give clips a view that they are missing, in one commit.

        Args:
            view: the view.
            clip_id: (b,) clips without it.
            value: (b, D_view) features.
            as_is: do not scale them: they come from a store that has done so.

        Raises:
            NotFound: a clip that is not there.
            InvalidInput: a clip that has the view, or features that do not fit.
        """
        writer = self._writing()
        self.flush()
        ids = id_vector(clip_id, "clip_id", len(to_host(clip_id, "clip_id")))
        phase = self._at(None)
        phase.require_view(view)
        changing.fill(writer, phase, view, ids, value, as_is=as_is)
        self._moved(phase.clips)

    def add_view(self, name: str, dim: int, *, dtype: str = "float32", normalise: bool = False) -> None:
        """Add a view that no clip has yet; `fill` and `append` bring its features."""
        writer = self._writing()
        self.flush()
        described = check_views({name: dim}, dtype, normalise=normalise)
        changing.add_view(writer, name, described[name])
        self._moved(self._at(None).clips)

    def set_column(self, name: str, values: object, *, kind: str | None = None) -> None:
        """Add a column (n,) of a `kind`, or a new version of one; older commits keep showing the older version."""
        writer = self._writing()
        self.flush()
        dictionary = changing.set_column(writer, name, values, kind)
        if dictionary is not None:
            self._dictionaries[name] = dictionary
        self._moved(self._at(None).clips)

    def merge(self, groups: Sequence[str | os.PathLike[str]] | None = None, *, keep: bool = False) -> int:
        """Take staging groups into the current phase in one commit; see `cascade_engine.store.staging.merge`."""
        from cascade_engine.store import staging

        return staging.merge(self, groups, keep=keep)

    def archive(
        self, target: str | os.PathLike[str], codec: str = "zstd", *, phase: str | None = None
    ) -> tuple[int, int]:
        """Write a phase as compressed plain Zarr; see `cascade_engine.store.exchanging.archive`."""
        from cascade_engine.store import exchanging

        return exchanging.archive(self, Path(target), codec, phase=phase)

    def flush(self) -> None:
        """Publish what ``durability="group"`` has gathered."""
        writer = self._writing()
        if writer.pending is not writer.record:
            writer.publish("append")
            self._moved(self._at(None).clips)

    def seal(self, phase: str | None = None) -> None:
        """Make a phase final: nothing can be added any more, and it can be linked, copied and published safely.

        Args:
            phase: the current one by default, which the store then goes on to read.
        """
        if phase is not None and phase != self.phase:
            with FeatureStore.open(self.path, mode="a", phase=phase) as other:
                other.seal()
            self._snapshots.pop(phase, None)
            return
        writer = self._writing()
        writer.pending = replace(writer.pending, sealed=True)
        writer.publish("seal")
        self._moved(self._at(None).clips)
        self.close()

    def new_phase(
        self,
        name: str,
        views: Mapping[str, int] | None = None,
        *,
        dtype: str | Mapping[str, str] | None = None,
        columns: Mapping[str, str] | None = None,
        normalise: bool | None = None,
        durability: Durability = "commit",
        model: str | None = None,
        preprocessing: str | None = None,
    ) -> FeatureStore:
        """Add an empty phase, say of the next model version, and return the store opened to append to it.

        Views, types and columns are the current phase's where not given.

        Raises:
            StoreError: there is a phase of that name, or the disk refuses.
        """
        own = emptied(self._at(None).record)
        kinds = {view: about.dtype for view, about in own.views.items()}
        described = check_views(views or self.views, dtype or kinds, normalise=bool(normalise))
        if normalise is None:
            was = {view for view, about in own.views.items() if about.normalised}
            described = {view: replace(about, normalised=view in was) for view, about in described.items()}
        types = {column: about.type for column, about in own.columns.items() if column not in BUILT_IN}
        fresh = empty_record(
            phase=check_phase(name),
            uid=own.uid,
            views=described,
            columns=check_columns(types if columns is None else columns, described),
            chunk_bytes=max(own.arrays[view].chunk_bytes for view in own.views),
            parent=self.phase,
            model=model,
            preprocessing=preprocessing,
        )
        make_phase(self.path, fresh)
        return FeatureStore.open(self.path, mode="a", phase=name, durability=durability)

    def refresh(self) -> None:
        """Move on to the last commit of every phase; a writer's own is always at that."""
        self._snapshots = {} if self._writer is None else {self.phase: self._at(None)}

    def close(self) -> None:
        """Publish what is pending and release the phase's lock; reading goes on. In a forked process neither."""
        writer, lock = self._writer, self._lock
        self._writer, self._lock = None, None
        try:
            if writer is not None and lock is not None:
                writer.close() if lock.ours else writer.abandon()
        finally:
            self._snapshots.clear()
            if lock is not None:
                lock.release()

    def _writing(self) -> PhaseWriter:
        if self._writer is None:
            raise StoreError(f"{self.path}: expected a store opened with mode='a', got one that is read-only or closed")
        if self._lock is not None and not self._lock.ours:
            raise StoreError(f"{self.path}: the process that this one was forked from writes it")
        return self._writer

    def _at(self, phase: str | None) -> Phase:
        """A phase as this store sees it."""
        name = phase or self.phase
        if name not in self._snapshots:
            folder = self.path / "phases" / check_phase(name)
            mine = self._writer is not None and name == self.phase
            record = self._writer.record if self._writer is not None and mine else read_record(folder)
            self._snapshots[name] = Phase(folder, record)
        return self._snapshots[name]

    def _moved(self, index: ClipIndex) -> None:
        """Look at the writer's newest commit from now on; the index of clips goes along."""
        if self._writer is not None and self._at(None).record is not self._writer.record:
            self._snapshots[self.phase] = Phase(self.path / "phases" / self.phase, self._writer.record)
            self._snapshots[self.phase].clips = index


def _from_afar(url: str, mode: str, phase: str | None) -> FeatureStore:
    from cascade_engine.store import publishing

    if mode != "r":
        raise StoreError(f"{url}: a published store can only be read")
    return publishing.fetch(url, phase=phase)


def _require_new(index: ClipIndex, batch: Batch) -> None:
    if len(again := index.duplicates(batch.rows["clip_id"])):
        raise InvalidInput(f"clip_id: expected new clips, got clip {int(again[0])} again")

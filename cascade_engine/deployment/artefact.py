"""One file that holds a deployed model: a torch.export program or an ONNX graph, and what it needs to know.

Everything that runs is in the graph (see `classifier`); what stands before it - frame size, clip length, which views,
which flow - and the labels are JSON inside the same file. Reading one imports no model and no training code.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from cascade_engine import __version__
from cascade_engine.errors import BackendUnavailable, CheckpointError, InvalidInput
from cascade_engine.tensor import Host

if TYPE_CHECKING:
    from cascade_engine.deployment.classifier import Classifier

F32 = npt.NDArray[np.float32]

FORMAT = 1
_ENTRY = "cascade.json"
SUFFIXES = (".pt2", ".onnx")
MAX_BATCH = 4096
ONNX_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class ViewSignature:
    """One input of the graph: (B, frames, size, size, channels) of `dtype`; and the width of its features."""

    name: str
    channels: int
    dtype: str
    dim: int


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What an exported model takes and gives.

    Args:
        views: the graph's inputs, in order.
        frames: frames of a clip.
        stride: frames of the video from one frame of a clip to the next.
        size: side of the decoded frames.
        flow: how optical flow is computed where a view needs it.
        labels: names of the classes, in the order of the probabilities; none for a model of features alone.
        features: ``"backbone"`` or ``"projection"``.
        source: the run and phase it came from, and how it was trained, for people.
        engine: version of cascade_engine that wrote it.
        torch: version of torch that wrote it.
        format: version of this description.
    """

    views: tuple[ViewSignature, ...]
    frames: int
    stride: int
    size: int
    flow: str
    labels: tuple[str, ...]
    features: str
    source: dict[str, str]
    engine: str = __version__
    torch: str = ""
    format: int = FORMAT

    @property
    def span(self) -> int:
        """Frames of video that a clip reaches over."""
        return (self.frames - 1) * self.stride + 1

    def to_json(self) -> str:
        """The description as it is written into the file."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, path: Path) -> Signature:
        """Read a description.

        Raises:
            CheckpointError: none, one of a newer format, or one that lacks an entry; the message names the file.
        """
        try:
            values = json.loads(text)
            version = values.pop("format")
        except (ValueError, KeyError, AttributeError):
            raise CheckpointError(f"{path}: not a model exported by cascade_engine") from None
        if version != FORMAT:
            raise CheckpointError(
                f"{path}: written by cascade_engine {values.get('engine', '?')} in format {version}; "
                f"this is {__version__} and reads format {FORMAT}"
            )
        try:
            views = tuple(ViewSignature(**view) for view in values.pop("views"))
            return cls(views=views, labels=tuple(values.pop("labels")), format=version, **values)
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: its description is incomplete ({error})") from None


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a model says of a batch of clips.

    Args:
        probabilities: (B, labels) float32, or None for a model of features alone.
        features: view to (B, D) float32 of unit length.
    """

    probabilities: F32 | None
    features: dict[str, F32]


class _Program(Protocol):
    """A loaded graph: its inputs in order to its outputs in order."""

    def __call__(self, inputs: list[Host]) -> list[F32]: ...


class Model:
    """An exported model, ready to run on the CPU."""

    def __init__(self, path: Path, signature: Signature, program: _Program) -> None:
        self.path, self.signature, self._program = path, signature, program

    @property
    def fingerprint(self) -> str:
        """A hash of the file: features of different models must not meet in one phase of a store."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def run(self, pixels: Mapping[str, Host]) -> Output:
        """Probabilities and features of a batch of clips, of any size; the graph meets at most `MAX_BATCH` at once.

        Args:
            pixels: for each view (B, frames, size, size, channels), as the view is stored.

        Raises:
            InvalidInput: a view is missing, has another shape or type, or other clips than the first.
        """
        inputs = [_checked(pixels, view, self.signature) for view in self.signature.views]
        count = len(inputs[0])
        if any(len(each) != count for each in inputs):
            raise InvalidInput(f"pixels: expected as many clips in every view, got {[len(each) for each in inputs]}")
        parts = [
            self._program([each[first : first + MAX_BATCH] for each in inputs]) for first in range(0, count, MAX_BATCH)
        ]
        outputs = parts[0] if len(parts) == 1 else [np.concatenate(each) for each in zip(*parts, strict=True)]
        probabilities = outputs.pop(0) if self.signature.labels else None
        names = (view.name for view in self.signature.views)
        return Output(probabilities=probabilities, features=dict(zip(names, outputs, strict=True)))


def _checked(pixels: Mapping[str, Host], view: ViewSignature, signature: Signature) -> Host:
    if view.name not in pixels:
        raise InvalidInput(f"pixels: expected the view {view.name!r}, got {', '.join(pixels) or 'none'}")
    given = pixels[view.name]
    want = (signature.frames, signature.size, signature.size, view.channels)
    if given.shape[1:] != want or str(given.dtype) != view.dtype or not len(given):
        raise InvalidInput(
            f'pixels["{view.name}"]: expected (B, {", ".join(map(str, want))}) {view.dtype}, '
            f"got {given.shape} {given.dtype}"
        )
    return np.ascontiguousarray(given)


def save(classifier: Classifier, signature: Signature, path: str | Path) -> Path:
    """Export a classifier as one file, by the suffix: ``.pt2`` (torch.export) or ``.onnx``.

    An ONNX file is run by onnxruntime once and compared with torch before it is kept.

    Raises:
        InvalidInput: another suffix.
        BackendUnavailable: .onnx without the packages onnx, onnxscript and onnxruntime.
        CheckpointError: onnxruntime and torch differ by more than 1e-4.
    """
    import torch

    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise InvalidInput(f"to: expected a name that ends in {' or '.join(SUFFIXES)}, got {target.name!r}")
    classifier = classifier.eval()
    generator = np.random.default_rng(0)
    sample = tuple(
        torch.from_numpy(generator.integers(0, 127, (2, *_shape(signature, view))).astype(view.dtype))
        for view in signature.views
    )
    described = Signature(**{**_fields(signature), "torch": torch.__version__})
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    shapes = (tuple({0: batch} for _ in sample),)
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad():
            if target.suffix == ".pt2":
                program = torch.export.export(classifier, sample, dynamic_shapes=shapes)
                with warnings.catch_warnings():
                    # weights whose channels lie last are not "complete"; they are stored whole, order and all
                    warnings.filterwarnings("ignore", "No complete tensor", UserWarning)
                    torch.export.save(program, partial, extra_files={_ENTRY: described.to_json()})
            else:
                _save_onnx(classifier, sample, shapes, described, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _shape(signature: Signature, view: ViewSignature) -> tuple[int, ...]:
    return (signature.frames, signature.size, signature.size, view.channels)


def _fields(signature: Signature) -> dict[str, Any]:
    return {name: getattr(signature, name) for name in signature.__dataclass_fields__}


def _save_onnx(classifier: Classifier, sample: Any, shapes: Any, signature: Signature, path: Path) -> None:
    import torch

    try:
        import onnx
        import onnxruntime  # noqa: F401  (checked before the slow export)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(f"onnx: {error}; install cascade-engine[deploy]") from None
    outputs = [*(["probabilities"] if signature.labels else []), *(f"{view.name}_features" for view in signature.views)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it tells that all inputs share their batch axis, as they should
        program = torch.onnx.export(
            classifier,
            sample,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=[view.name for view in signature.views],
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    entry = graph.metadata_props.add()
    entry.key, entry.value = _ENTRY, signature.to_json()
    onnx.save(graph, path)
    expected = [each.numpy() for each in classifier(*sample)]
    found = _OnnxProgram(path)([each.numpy() for each in sample])
    worst = max(float(np.abs(a - b).max()) for a, b in zip(expected, found, strict=True))
    if not worst <= ONNX_TOLERANCE:
        raise CheckpointError(f"{path}: onnxruntime differs from torch by {worst:.2g}, more than {ONNX_TOLERANCE:g}")


def load(path: str | Path, *, threads: int | None = None) -> Model:
    """Read an exported model.

    Args:
        path: a .pt2 or .onnx file that `save` wrote.
        threads: of onnxruntime; torch's are set by `torch.set_num_threads`.

    Raises:
        CheckpointError: no such file, not such a model, damaged, or written in a newer format.
        BackendUnavailable: .onnx without onnxruntime.
    """
    source = Path(path)
    if not source.is_file():
        raise CheckpointError(f"{source}: no such file")
    if source.suffix not in SUFFIXES:
        raise CheckpointError(f"{source}: expected a .pt2 or .onnx file")
    if source.suffix == ".pt2":
        return _load_program(source)
    program = _OnnxProgram(source, threads)
    text = program.session.get_modelmeta().custom_metadata_map.get(_ENTRY, "")
    return Model(source, Signature.from_json(text, source), program)


def _load_program(path: Path) -> Model:
    import zipfile

    import torch

    # The description is read first, so that a file of a newer format says so and is not half understood.
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"extra/{_ENTRY}")]
            text = archive.read(names[0]).decode() if names else ""
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError, EOFError) as error:
        raise CheckpointError(f"{path}: not a readable .pt2 file ({error})") from None
    signature = Signature.from_json(text, path)
    try:
        module = torch.export.load(path).module()
    except Exception as error:  # torch raises many kinds for a damaged archive
        raise CheckpointError(f"{path}: torch {torch.__version__} cannot load it ({error})") from error

    def run(inputs: list[Host]) -> list[F32]:
        with torch.no_grad():
            return [each.numpy() for each in module(*(torch.from_numpy(given) for given in inputs))]

    return Model(path, signature, run)


class _OnnxProgram:
    """An onnxruntime session, called as a graph."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendUnavailable(f"onnx: {error}; install cascade-engine[deploy]") from None
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no base
            raise CheckpointError(f"{path}: onnxruntime cannot load it ({error})") from None

    def __call__(self, inputs: list[Host]) -> list[F32]:
        names = [each.name for each in self.session.get_inputs()]
        found: list[F32] = self.session.run(None, dict(zip(names, inputs, strict=True)))
        return found

"""From folders of training to one classifier with its signature, ready to be exported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cascade_engine.deployment.artefact import Signature, ViewSignature
from cascade_engine.deployment.classifier import Classifier, Crops, FeatureKind, Stream
from cascade_engine.deployment.finetuned import FineTuned
from cascade_engine.errors import InvalidInput
from cascade_engine.training.run import Run
from cascade_engine.video.views import VIEWS


def assemble(
    folders: Sequence[str | Path],
    *,
    views: Sequence[str] | None = None,
    phase: str | None = None,
    crops: Crops = 1,
    features: FeatureKind = "backbone",
) -> tuple[Classifier, Signature]:
    """One classifier of several fine-tuned streams, or one that gives a run's features alone.

    Args:
        folders: fine-tuned classifiers, each of a view of its own, whose probabilities are averaged; or one run.
        views: of a run; all of its views by default.
        phase: of a run; the last one done by default.
        crops: of every clip; see `Classifier`.
        features: what the model gives as features.

    Raises:
        InvalidInput: two folders of one view, streams that take other clips or know other labels, or several runs.
        CheckpointError: weights that do not fit.
    """
    if not folders:
        raise InvalidInput("folders: expected a run or fine-tuned classifiers, got none")
    if all(FineTuned.is_in(folder) for folder in folders):
        if views is not None or phase is not None:
            raise InvalidInput("views, phase: expected with a run alone; a fine-tuned classifier has its own")
        return _finetuned([FineTuned.open(folder) for folder in folders], crops, features)
    if len(folders) > 1:
        plain = next(str(folder) for folder in folders if not FineTuned.is_in(folder))
        raise InvalidInput(f"with: expected fine-tuned classifiers, {plain} is none")
    run = Run.open(folders[0])
    chosen = tuple(views) if views is not None else run.views
    streams = {view: Stream(run.encoder(view, phase), 0, features) for view in chosen}
    classifier = Classifier(streams, side=run.config.clip.size, crops=crops).eval()
    source = {"run": run.config.name} | {f"phase of {view}": run.trained_in(view, phase) for view in chosen}
    return classifier, _signature(run, classifier, (), features, source)


def _finetuned(members: Sequence[FineTuned], crops: Crops, features: FeatureKind) -> tuple[Classifier, Signature]:
    first = members[0]
    streams: dict[str, Stream] = {}
    source: dict[str, str] = {}
    for member in members:
        view = member.config.view
        if view in streams:
            raise InvalidInput(f"with: expected another view than {view!r}, got it twice")
        if member.labels != first.labels or _clips(member.run) != _clips(first.run):
            raise InvalidInput(f"with: expected the labels and clips of {first.run.folder}, got others of {view!r}")
        if features == "projection":
            raise InvalidInput("features: expected 'backbone', a fine-tuned classifier leaves the projection behind")
        streams[view] = member.stream
        source[view] = f"{member.run.config.name}, phase {member.run.trained_in(view, member.config.phase)}, fine-tuned"
    classifier = Classifier(streams, side=first.run.config.clip.size, crops=crops).eval()
    return classifier, _signature(first.run, classifier, first.labels, features, source)


def _clips(run: Run) -> tuple[int, int, int, int, str]:
    """What a run's clips are: frames, stride, side of the encoder's picture and of the frames, flow method."""
    clip, data = run.config.clip, run.config.data
    return clip.frames, clip.stride, clip.size, data.size, data.flow


def _signature(
    run: Run, classifier: Classifier, labels: tuple[str, ...], features: FeatureKind, source: dict[str, str]
) -> Signature:
    frames, stride, _, size, flow = _clips(run)
    views = tuple(
        ViewSignature(
            name=view,
            channels=VIEWS[view].channels,
            dtype="int8" if VIEWS[view].signed else "uint8",
            dim=classifier.dims[view],
        )
        for view in classifier.views
    )
    return Signature(
        views=views,
        frames=frames,
        stride=stride,
        size=size,
        flow=flow,
        labels=labels,
        features=features,
        source=source,
    )

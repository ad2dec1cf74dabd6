"""A small two-view classifier with drawn weights, and its signature: what the deployment tests export."""

import torch

from cascade_engine.deployment.artefact import Signature, ViewSignature
from cascade_engine.deployment.classifier import Classifier, Stream
from cascade_engine.models.encoder import build_encoder

LABELS = ("run", "jump", "wave")
SIZE, SIDE, FRAMES, STRIDE = 36, 32, 4, 2


class Live:
    """A live classifier called as an exported graph is, noting the sizes of its batches."""

    def __init__(self, made):
        self.classifier, self.batches = made, []

    def __call__(self, inputs):
        self.batches.append(len(inputs[0]))
        with torch.no_grad():
            return [each.numpy() for each in self.classifier(*map(torch.from_numpy, inputs))]


def classifier(views=("rgb", "residual"), *, labels=LABELS, crops=1, seed=0, features="backbone"):
    """Random encoders, their batch norm settled on random clips, and classifiers that tell those clips apart."""
    torch.manual_seed(seed)
    channels = {"rgb": 3, "residual": 3, "flow": 2}
    streams = {v: Stream(build_encoder("r3d_small", channels[v]), len(labels), features) for v in views}
    made = Classifier(streams, side=SIDE, crops=crops)
    with torch.no_grad():
        for view, stream in streams.items():
            clips = made.prepare(view, pixels(view, 16, seed))
            for module in stream.modules():
                if isinstance(module, torch.nn.BatchNorm3d):
                    module.momentum = 1.0
            stream.train()(clips)
            pooled = stream.eval().backbone(clips)
            if stream.classifier is not None:
                stream.classifier.weight *= 3 / pooled.std(0).mean()
                stream.classifier.bias.copy_(-stream.classifier.weight @ pooled.mean(0))
    return made.eval()


def pixels(view, batch, seed=0):
    """Random stored pixels (batch, FRAMES, SIZE, SIZE, C)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, FRAMES, SIZE, SIZE, 2 if view == "flow" else 3)
    if view == "rgb":
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def signature(made, *, labels=LABELS, features="backbone"):
    return Signature(
        views=tuple(
            ViewSignature(
                name=view,
                channels=2 if view == "flow" else 3,
                dtype="uint8" if view == "rgb" else "int8",
                dim=made.dims[view],
            )
            for view in made.views
        ),
        frames=FRAMES,
        stride=STRIDE,
        size=SIZE,
        flow="dis",
        labels=labels,
        features=features,
        source={"run": "a test"},
    )

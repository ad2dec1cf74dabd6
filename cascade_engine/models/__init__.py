"""Video encoders: a registry of backbones, the projection head, the momentum copy, batch norm that does not leak."""

from cascade_engine.models.encoder import ENCODERS as ENCODERS
from cascade_engine.models.encoder import Encoder as Encoder
from cascade_engine.models.encoder import build_encoder as build_encoder
from cascade_engine.models.momentum import MomentumEncoder as MomentumEncoder
from cascade_engine.models.weights import load_weights as load_weights

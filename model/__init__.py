"""The network: length configs, the length-adaptive encoder, its training and its evaluation."""

from model.encoder import LengthAdaptiveModel
from model.length_config import LengthConfig

__all__ = ["LengthAdaptiveModel", "LengthConfig"]

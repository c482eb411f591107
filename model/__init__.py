"""The network: length configs, the length-adaptive encoder, its training, its evaluation and its use.

The public names are fetched when they are asked for: a length config needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.encoder import LengthAdaptiveModel
    from model.length_config import LengthConfig
    from model.pipeline import LengthAdaptivePipeline

__all__ = ["LengthAdaptiveModel", "LengthAdaptivePipeline", "LengthConfig"]

_HOMES = {"LengthAdaptiveModel": "encoder", "LengthAdaptivePipeline": "pipeline", "LengthConfig": "length_config"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"model.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""From a hub id or folder to weights in a model, and back.

hub (folder) -> weights (names of every layout, strict) -> device_map (where to) -> filling -> pretrained
(the model); saving and atomic write a folder that an interruption cannot spoil.
"""

from audioflamingo.checkpoint.filling import build_empty
from audioflamingo.checkpoint.hub import resolve_folder
from audioflamingo.checkpoint.pretrained import PretrainedMixin, read_config

__all__ = ["PretrainedMixin", "build_empty", "read_config", "resolve_folder"]

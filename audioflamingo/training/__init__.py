"""Training: `train(load_config("train.yaml"))`, or `af3 train train.yaml`."""

from audioflamingo.errors import DataError, NonFiniteLossError, TrainingError
from audioflamingo.training.config import TrainingConfig, load_config
from audioflamingo.training.trainer import TrainingResult, train

__all__ = [
    "DataError",
    "NonFiniteLossError",
    "TrainingConfig",
    "TrainingError",
    "TrainingResult",
    "load_config",
    "train",
]

"""Training: `train(load_config("train.yaml"))`, or `af3 train train.yaml`."""

from audioflamingo.errors import DataError, NonFiniteLossError, TrainingError
from audioflamingo.training.trainer import TrainingResult, train
from audioflamingo.training.training_config import TrainingConfig, load_config

__all__ = [
    "DataError",
    "NonFiniteLossError",
    "TrainingConfig",
    "TrainingError",
    "TrainingResult",
    "load_config",
    "train",
]

"""The data of a run: read, and freed of rows that no batch could hold."""

from __future__ import annotations

from audioflamingo.config import AUDIO_TOKENS_PER_S, AudioFlamingo3Config
from audioflamingo.datasets.conversations import DataRow, Dataset, Skipped, read_dataset
from audioflamingo.errors import DataError
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.training.training_config import TrainingConfig

_MOST_FIXED = 1000  # more tokens than any template puts around a conversation


def read_data(
    config: TrainingConfig, processor: AudioFlamingo3Processor, model_config: AudioFlamingo3Config
) -> tuple[list[Dataset], list[Dataset]]:
    """The data sets of training and of validation.

    Raises:
        DataError: as `read_dataset`, or a row longer than the model's context where bad rows are errors.
    """
    data = config.data
    bounds = (data.on_bad_row, data.min_duration_s, data.max_duration_s, config.seed)
    context = model_config.text_config.max_position_embeddings
    both = []
    for configs in (data.train, data.validation):
        datasets = [read_dataset(item, *bounds) for item in configs]
        for dataset in datasets:
            _leave_out_long(dataset, processor, context, data.on_bad_row)
        both.append(datasets)
    return both[0], both[1]


def num_tokens_of(row: DataRow, processor: AudioFlamingo3Processor) -> int:
    """Tokens of a row, those of its audio by its stated length."""
    text = processor.training_text(row.messages)
    return len(text.token_ids) - text.num_clips + round(row.duration_s * AUDIO_TOKENS_PER_S)


def _leave_out_long(
    dataset: Dataset, processor: AudioFlamingo3Processor, context: int, on_bad_row: str
) -> None:
    kept = []
    for row in dataset.rows:
        most = (
            4 * row.num_characters + row.duration_s * AUDIO_TOKENS_PER_S + _MOST_FIXED
        )  # a token is a byte or more
        if most <= context or (num_tokens := num_tokens_of(row, processor)) <= context:
            kept.append(row)
            continue
        reason = f"{num_tokens} tokens, more than the {context} of the model's context"
        if on_bad_row == "error":
            raise DataError(f"{row.place}: {reason}. Split the row, or set on_bad_row: skip.")
        dataset.skipped.append(Skipped(row.place, reason, is_bad=True))
    if not kept:
        raise DataError(f"every row is longer than the {context} tokens of the model's context.")
    dataset.rows = kept

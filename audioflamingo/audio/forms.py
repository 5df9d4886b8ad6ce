"""Audio as other libraries hand it over, in the forms that `load_audio` reads.

Rows of `datasets` (`{"array", "sampling_rate"}`, `{"bytes", "path"}`), inputs of transformers' pipelines (`{"raw",
"sampling_rate"}`), vLLM's `{"url"}`, decoders of `datasets` and torchcodec, and pairs of a rate and samples: Gradio's
`(rate, samples)`, soundfile's and torchaudio's `(samples, rate)`. None is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from audioflamingo.errors import ArgumentError, AudioError

BYTES = str | bytes | bytearray | memoryview


def unwrap(source: Any, sampling_rate: float | None = None) -> tuple[Any, float | None]:
    """Takes the audio out of another library's form.

    Args:
        source: whatever `load_audio` takes.
        sampling_rate: Hz that the caller states.

    Returns:
        A path, bytes, file object or array, and its sampling rate as far as it is stated.

    Raises:
        ArgumentError: two different rates, or a dict without audio.
        AudioError: an array of which samples are masked.
    """
    stated = None
    if isinstance(source, Mapping):
        source, stated = _of_row(source)
    elif is_pair(source):
        first, second = source
        source, stated = (second, first) if _is_array(second) else (first, second)
    elif hasattr(source, "get_all_samples"):
        source = source.get_all_samples()
    if hasattr(source, "data") and hasattr(source, "sample_rate"):
        source, stated = source.data, source.sample_rate
    if isinstance(source, np.ma.MaskedArray):
        num_masked = int(np.ma.getmaskarray(source).sum())
        if num_masked:
            raise AudioError(
                f"{num_masked} samples of the array are masked; fill them (.filled(0)) or cut them out."
            )
        source = source.data
    if stated is not None and sampling_rate is not None and stated != sampling_rate:
        raise ArgumentError(
            f"sampling_rate={sampling_rate!r} contradicts the audio, which states {stated!r} Hz."
        )
    return source, sampling_rate if stated is None else stated


def _of_row(row: Mapping[Any, Any]) -> tuple[Any, float | None]:
    """The audio of a row of `datasets`, decoded or not, or of its likes."""
    for name in ("array", "raw"):
        if (array := row.get(name)) is not None:
            return np.asarray(array) if isinstance(array, list) else array, row.get("sampling_rate")
    for name in ("bytes", "path", "url"):
        if row.get(name) is not None:
            return row[name], None
    raise ArgumentError(
        f"a dict of audio has an 'array' with its 'sampling_rate', or 'bytes', or a 'path' or 'url'; this one has "
        f"{', '.join(repr(str(name)) for name in row) or 'nothing'}."
    )


def is_pair(source: Any) -> bool:
    """Whether a source is a sampling rate and samples, in either order."""
    if not isinstance(source, tuple | list) or len(source) != 2:
        return False
    kinds = [_is_rate(item) - _is_array(item) for item in source]
    return sorted(kinds) == [-1, 1]


def as_sources(audio: Any) -> list[Any]:
    """One source, several of them, or None, as a list; a column of `datasets` is several."""
    if audio is None:
        return []
    is_several = isinstance(audio, Sequence) and not isinstance(audio, BYTES) and not is_pair(audio)
    return list(audio) if is_several else [audio]


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | torch.Tensor)

"""Which of a file's audio tracks is heard."""

from __future__ import annotations

from typing import Any

from audioflamingo.errors import AudioError, warn

# Flags of tracks that are for some listeners, or beside the matter.
ASIDES = ("comment", "hearing_impaired", "visual_impaired", "karaoke", "lyrics", "clean_effects")


def choose_track(container: Any, track: int | None, name: str) -> Any:
    """The audio stream to decode: the one asked for, else the default one.

    Args:
        container: an open PyAV container.
        track: number of an audio track, from 1 on.
        name: what messages call the file.

    Raises:
        AudioError: there is none that can be decoded, or not so many.
    """
    streams = list(container.streams.audio)
    usable = [stream for stream in streams if stream.codec_context is not None]
    if not usable:
        kinds = ", ".join(sorted({s.type or "data" for s in container.streams})) or "nothing"
        raise AudioError(
            f"{name} has no audio that can be decoded (it holds: {kinds}). Pass a file with sound."
        )
    if track is None:
        return min(usable, key=_rank)  # the first of several
    if track > len(streams) or streams[track - 1] not in usable:
        raise AudioError(
            f"{name} has no audio track {track} that can be decoded; it has {_describe_all(streams)}."
        )
    return streams[track - 1]


def warn_of_others(container: Any, chosen: Any, name: str) -> None:
    """Says which track is heard, where there are several and nobody chose one."""
    streams = list(container.streams.audio)
    if len(streams) > 1:
        warn(
            f"{name} has {len(streams)} audio tracks: {_describe_all(streams)}. Track {streams.index(chosen) + 1} is "
            "heard; track=N (--track N) chooses another."
        )


def _rank(stream: Any) -> tuple[bool, bool]:
    return not _has(stream, "default"), any(_has(stream, flag) for flag in ASIDES)


def _has(stream: Any, flag: str) -> bool:
    return bool(getattr(type(stream.disposition), flag, 0) & stream.disposition)


def _describe_all(streams: list[Any]) -> str:
    return ", ".join(f"{number} ({_describe(stream)})" for number, stream in enumerate(streams, start=1))


def _describe(stream: Any) -> str:
    context = stream.codec_context
    title = stream.metadata.get("title", "")[:60]
    parts = (
        "unknown" if context is None else context.name,
        stream.metadata.get("language", "")[:20].replace("und", ""),
        repr(title) if title else "",
        "default" if _has(stream, "default") else "",
    )
    return ", ".join(part for part in parts if part)

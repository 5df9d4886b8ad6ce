"""Opens encoded audio wherever it is: a path, an http(s) URL, a `data:` URI, bytes, a binary file object.

Every source ends as one seekable binary file and a name for error messages. What is inside is not looked at
here: see `decoding`.
"""

from __future__ import annotations

import base64
import io
import os
import re
import urllib.parse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, BinaryIO

from audioflamingo.audio.fetching import FetchPolicy, fetch, new_spool, shorten
from audioflamingo.errors import ArgumentError, AudioError, reason_of

URL_TIMEOUT_S = 30.0  # longest wait for the server to connect or to send the next bytes
MAX_DOWNLOAD_BYTES = 2 * 1024**3  # a two-hour WAV at 48 kHz, 16 bit, stereo is 1.4e9 bytes
COPY_BYTES = 1024**2


@contextmanager
def open_source(source: Any) -> Iterator[tuple[BinaryIO, str]]:
    """Opens encoded audio.

    Args:
        source: `str` (path, `http://` or `https://` URL, `data:` URI), `os.PathLike`, bytes-like object, or
            binary file object. A seekable file object is read from its start, whatever its position, and
            stays open.

    Yields:
        A seekable binary file, and what to call the source in messages. Both are closed on exit, except a
        file object of the caller's.

    Raises:
        AudioError: the source cannot be opened, fetched or read.
        ArgumentError: `source` is none of these types.
    """
    if isinstance(source, str) and (scheme := _uri_scheme(source)):
        if scheme == "data":
            yield io.BytesIO(decode_data_uri(source)), shorten(source, 40)
            return
        with _fetch(source, scheme) as file:
            yield file, shorten(source)
    elif isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        with _open_path(path) as opened, _seekable(opened, shorten(path)) as file:
            yield file, shorten(path)
    elif isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(bytes(source)), f"audio bytes (length {memoryview(source).nbytes})"
    elif hasattr(source, "read"):
        name = getattr(source, "name", None)
        label = shorten(name) if isinstance(name, str) else f"file object {type(source).__name__}"
        with _seekable(source, label) as file:
            yield file, label
    else:
        raise ArgumentError(
            f"audio of type {type(source).__name__} is not understood. Pass a path, an http(s) URL, a data: "
            "URI, bytes, a binary file object, a NumPy array or a torch tensor (a list of samples: "
            "numpy.asarray(samples))."
        )


def is_pipe(source: Any) -> bool:
    """Whether a source is a path that can be read once only: a pipe, a terminal, `/dev/stdin`."""
    if not isinstance(source, str | os.PathLike) or (isinstance(source, str) and _uri_scheme(source)):
        return False
    path = os.path.expanduser(os.fsdecode(source))
    try:
        return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    except ValueError:  # a null byte
        return False


def _uri_scheme(text: str) -> str | None:
    """Scheme of a URI in lower case, or None for a path (`C:\\clip.wav` is one)."""
    match = re.match(r"(data|file)(?=:)|[a-z][a-z0-9+.-]+(?=://)", text, re.IGNORECASE)
    return match[0].lower() if match else None


def _open_path(path: str) -> BinaryIO:
    name = shorten(path)
    try:
        return open(os.path.expanduser(path), "rb")
    except FileNotFoundError:
        raise AudioError(
            f"{name}: there is no such file. Check the path (read from {os.getcwd()!r})."
        ) from None
    except IsADirectoryError:
        raise AudioError(f"{name}: this is a folder. Pass the path of one audio file.") from None
    except PermissionError:
        raise AudioError(f"{name}: no permission to read this file. Change its mode or owner.") from None
    except (OSError, ValueError) as error:  # a name too long, a null byte, a device that fails
        raise AudioError(
            f"{name}: the file cannot be opened ({reason_of(error)}). Check the path."
        ) from error


def decode_data_uri(uri: str) -> bytes:
    """The bytes that a `data:` URI holds.

    Raises:
        AudioError: it is broken.
    """
    header, comma, body = uri.partition(",")
    if not comma:
        raise AudioError(
            f"{shorten(uri, 40)}: a data: URI needs a comma before its data, as in "
            "'data:audio/wav;base64,UklGR...'."
        )
    is_base64 = header.lower().endswith(";base64")
    try:
        data = urllib.parse.unquote_to_bytes(body)
        return base64.b64decode(b"".join(data.split()), validate=True) if is_base64 else data
    except ValueError as error:  # also half a character that UTF-8 cannot write
        raise AudioError(
            f"{shorten(uri, 40)}: the data is not valid {'base64' if is_base64 else 'text'} ({error}). Encode it again."
        ) from error


def _seekable(file: Any, name: str) -> AbstractContextManager[BinaryIO]:
    """The file itself, rewound and not closed at exit, or a spooled copy of a file that cannot seek."""
    try:
        if isinstance(file.read(0), bytes):
            can_seek = (
                file.seekable()
                if hasattr(file, "seekable")
                else hasattr(file, "seek") and hasattr(file, "tell")
            )
            if not can_seek:
                return _copy(file)
            file.seek(0)
            return nullcontext(file)
    except (OSError, ValueError) as error:
        raise AudioError(
            f"{name} cannot be read ({error}). Pass a binary file object that is open."
        ) from error
    raise ArgumentError(f"{name} gives text, not bytes. Open it in binary mode: open(path, 'rb').")


def _copy(stream: Any) -> BinaryIO:
    """Copies what cannot seek to a temporary file."""
    copy = new_spool()
    while block := stream.read(COPY_BYTES):
        copy.write(block)
    copy.seek(0)
    return copy


def _fetch(url: str, scheme: str) -> BinaryIO:
    """Downloads from wherever the caller says: it is the caller's own machine."""
    if scheme == "file":
        raise AudioError(
            f"{shorten(url)}: file:// addresses are not opened. Pass the path itself, without 'file://'."
        )
    policy = FetchPolicy(
        max_bytes=MAX_DOWNLOAD_BYTES,
        wait_s=URL_TIMEOUT_S,
        allows_private=True,
        limit_name=f"{__name__}.MAX_DOWNLOAD_BYTES",
        advice="Check that the address is right and public, or download the file yourself and pass its path.",
    )
    return fetch(url, policy)

"""Opens encoded audio wherever it is: a path, an http(s) URL, a `data:` URI, bytes, a binary file object.

Every source ends as one seekable binary file and a name for error messages. What is inside is not looked at
here: see `decoding`.
"""

from __future__ import annotations

import base64
import io
import os
import re
import tempfile
import urllib.parse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, BinaryIO, cast

from audioflamingo.errors import ArgumentError, AudioError

URL_TIMEOUT_S = 30.0  # longest wait for the server to connect or to send the next bytes
MAX_DOWNLOAD_BYTES = 2 * 1024**3  # a two-hour WAV at 48 kHz, 16 bit, stereo is 1.4e9 bytes
SPOOL_BYTES = 32 * 1024**2  # downloads and pipes beyond this go to a temporary file on disk
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
            yield io.BytesIO(_decode_data_uri(source)), _shorten(source, 40)
            return
        with _fetch(source, scheme) as file:
            yield file, _shorten(source)
    elif isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        with _open_path(path) as file:
            yield file, _shorten(path)
    elif isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(bytes(source)), f"audio bytes (length {memoryview(source).nbytes})"
    elif hasattr(source, "read"):
        name = getattr(source, "name", None)
        label = _shorten(name) if isinstance(name, str) else f"file object {type(source).__name__}"
        with _seekable(source, label) as file:
            yield file, label
    else:
        raise ArgumentError(
            f"audio of type {type(source).__name__} is not understood. Pass a path, an http(s) URL, a data: "
            "URI, bytes, a binary file object, a NumPy array or a torch tensor (a list of samples: "
            "numpy.asarray(samples))."
        )


def _shorten(text: str, limit: int = 200) -> str:
    return repr(text if len(text) <= limit else f"{text[:limit]}...")


def _uri_scheme(text: str) -> str | None:
    """Scheme of a URI in lower case, or None for a path (`C:\\clip.wav` is one)."""
    match = re.match(r"(data|file)(?=:)|[a-z][a-z0-9+.-]+(?=://)", text, re.IGNORECASE)
    return match[0].lower() if match else None


def _open_path(path: str) -> BinaryIO:
    name = _shorten(path)
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
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"{name}: the file cannot be opened ({reason}). Check the path.") from error


def _decode_data_uri(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma:
        raise AudioError(
            f"{_shorten(uri, 40)}: a data: URI needs a comma before its data, as in "
            "'data:audio/wav;base64,UklGR...'."
        )
    data = urllib.parse.unquote_to_bytes(body)
    if not header.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except ValueError as error:
        raise AudioError(
            f"{_shorten(uri, 40)}: the data is not valid base64 ({error}). Encode it again."
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
                return _spool(file, name, max_bytes=None)
            file.seek(0)
            return nullcontext(file)
    except (OSError, ValueError) as error:
        raise AudioError(
            f"{name} cannot be read ({error}). Pass a binary file object that is open."
        ) from error
    raise ArgumentError(f"{name} gives text, not bytes. Open it in binary mode: open(path, 'rb').")


def _spool(stream: Any, name: str, max_bytes: int | None) -> BinaryIO:
    """Copies a stream to a temporary file: in memory while small, on disk beyond `SPOOL_BYTES`."""
    copy = cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES))  # noqa: SIM115, the caller's
    num_bytes = 0
    while block := stream.read(COPY_BYTES):
        num_bytes += len(block)
        if max_bytes is not None and num_bytes > max_bytes:
            copy.close()
            raise _too_large(name, max_bytes)
        copy.write(block)
    copy.seek(0)
    return copy


def _too_large(name: str, max_bytes: int) -> AudioError:
    return AudioError(
        f"{name}: more than {max_bytes} bytes, which is the most that is fetched (audioflamingo.audio.sources."
        "MAX_DOWNLOAD_BYTES). Download the file yourself and pass its path."
    )


def _fetch(url: str, scheme: str) -> BinaryIO:
    """Downloads `url` into a spooled temporary file. Redirects are followed, but only to http and https."""
    import http.client
    import urllib.error
    import urllib.request

    name = _shorten(url)
    if scheme == "file":
        raise AudioError(
            f"{name}: file:// addresses are not opened. Pass the path itself, without 'file://'."
        )
    if scheme not in ("http", "https"):
        raise AudioError(
            f"{name}: only http and https addresses are fetched. Download the file and pass its path."
        )

    opener = urllib.request.OpenerDirector()  # build_opener() would add handlers for ftp, file and data
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    advice = "Check that the address is right and public, or download the file yourself and pass its path."
    try:
        quoted = urllib.parse.quote(url, safe="%/:?#[]@!$&'()*+,;=~")
        request = urllib.request.Request(
            quoted, headers={"User-Agent": "audioflamingo", "Accept-Encoding": "identity"}
        )
        with opener.open(request, timeout=URL_TIMEOUT_S) as response:
            announced = response.headers.get("Content-Length", "")
            if announced.isdigit() and int(announced) > MAX_DOWNLOAD_BYTES:
                raise _too_large(name, MAX_DOWNLOAD_BYTES)
            file = _spool(response, name, MAX_DOWNLOAD_BYTES)
    except urllib.error.HTTPError as error:
        error.close()
        raise AudioError(
            f"{name}: the server answered with status {error.code} ({error.reason}). {advice}"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise AudioError(f"{name}: the address cannot be reached ({reason}). {advice}") from error
    num_bytes = file.seek(0, os.SEEK_END)
    if announced.isdigit() and num_bytes < int(announced):
        file.close()
        raise AudioError(
            f"{name}: the connection closed after {num_bytes} of {announced} bytes. Try again, or download "
            "the file yourself and pass its path."
        )
    file.seek(0)
    return file

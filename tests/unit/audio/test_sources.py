"""Where audio comes from: paths, addresses, data: URIs, bytes, file objects."""

from __future__ import annotations

import base64
import io
import os
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from audioflamingo.audio import load_audio, sources
from audioflamingo.errors import ArgumentError, AudioError
from tests.support.audio_files import encode, tone

WAV = encode(tone(0.25), 16000, "wav")
EXPECTED = load_audio(WAV)
ANSWERS = {
    "/ok.wav": (200, {}, WAV),
    "/with%20blank.wav?key=a%2Fb": (200, {}, WAV),
    "/moved.wav": (302, {"Location": "/ok.wav"}, b""),
    "/to_file.wav": (302, {"Location": "file:///etc/hostname"}, b""),
    "/to_ftp.wav": (302, {"Location": "ftp://127.0.0.1/x.wav"}, b""),
    "/loop.wav": (302, {"Location": "/loop.wav"}, b""),
    "/short.wav": (200, {"Content-Length": str(len(WAV) + 100)}, WAV),
    "/page.wav": (200, {}, b"<html>Sign in first</html>" * 20),
    "/broken.wav": (500, {}, b""),
}


@pytest.fixture(scope="module")
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = ANSWERS.get(self.path, (404, {}, b""))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def test_paths(tmp_path, monkeypatch):
    (tmp_path / "clip.wav").write_bytes(WAV)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in (
        str(tmp_path / "clip.wav"),
        tmp_path / "clip.wav",
        "clip.wav",
        "~/clip.wav",
        Path("~/clip.wav"),
    ):
        np.testing.assert_array_equal(load_audio(path), EXPECTED)


def test_the_name_of_a_file_does_not_matter(tmp_path):
    (tmp_path / "clip.mp3").write_bytes(WAV)
    np.testing.assert_array_equal(load_audio(tmp_path / "clip.mp3"), EXPECTED)
    (tmp_path / "text.wav").write_text("not sound\n" * 100)
    with pytest.raises(AudioError, match=r"text\.wav.*not audio"):
        load_audio(tmp_path / "text.wav")


def test_paths_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(AudioError, match=r"nowhere\.wav.*no such file"):
        load_audio(tmp_path / "nowhere.wav")
    with pytest.raises(AudioError, match="folder"):
        load_audio(tmp_path)
    for path in ("a\0b", "a" * 5000, ""):
        with pytest.raises(AudioError):
            load_audio(path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "open", refuse, raising=False)  # root may read everything
    with pytest.raises(AudioError, match="no permission"):
        load_audio(tmp_path / "secret.wav")


@pytest.mark.parametrize(
    "kind", [bytes, bytearray, memoryview, lambda data: memoryview(data * 2)[: len(data)]]
)
def test_bytes(kind):
    np.testing.assert_array_equal(load_audio(kind(WAV)), EXPECTED)


def test_file_objects(tmp_path):
    buffer = io.BytesIO(WAV)
    buffer.seek(1000)  # just written, or read before
    for _ in range(2):
        np.testing.assert_array_equal(load_audio(buffer), EXPECTED)
    (tmp_path / "clip.wav").write_bytes(WAV)
    with open(tmp_path / "clip.wav", "rb") as file:
        np.testing.assert_array_equal(load_audio(file), EXPECTED)
        assert not file.closed


@pytest.mark.parametrize("kind", ["wav", "m4a"])  # m4a has its tables at the end: it must be sought in
def test_a_pipe_cannot_seek(kind):
    data = encode(tone(0.25), 16000, kind)
    read_end, write_end = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(write_end, data), os.close(write_end)))
    writer.start()
    with os.fdopen(read_end, "rb") as pipe:
        decoded = load_audio(pipe)
    writer.join()
    np.testing.assert_array_equal(decoded, load_audio(data))


def test_file_objects_that_cannot_be_read(tmp_path):
    (tmp_path / "clip.wav").write_bytes(WAV)
    with open(tmp_path / "clip.wav") as text, pytest.raises(ArgumentError, match="'rb'"):
        load_audio(text)
    with (
        open(tmp_path / "new.wav", "wb") as file,
        pytest.raises(AudioError, match=r"new\.wav.*cannot be read"),
    ):
        load_audio(file)
    with pytest.raises(AudioError, match=r"new\.wav.*cannot be read"):
        load_audio(file)  # closed

    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 1000:
                raise OSError(5, "Input/output error")
            return super().read(min(size, 500))

    with pytest.raises(AudioError, match="Input/output error"):
        load_audio(Failing(WAV))


def test_data_uri():
    encoded = base64.b64encode(WAV).decode()
    percent = urllib.parse.quote_from_bytes(WAV)
    for uri in (
        f"data:audio/wav;base64,{encoded}",
        f"DATA:;BASE64,{encoded[:100]}\n{encoded[100:]}",
        f"data:audio/wav;name=a.wav;base64,{urllib.parse.quote(encoded)}",
        f"data:audio/wav,{percent}",
    ):
        np.testing.assert_array_equal(load_audio(uri), EXPECTED)
    with pytest.raises(AudioError, match="base64"):
        load_audio("data:audio/wav;base64,&&&&")
    with pytest.raises(AudioError, match="comma"):
        load_audio(f"data:audio/wav;base64{encoded}"[:3000])
    with pytest.raises(AudioError) as caught:
        load_audio(f"data:audio/wav;base64,{encoded[:2000]}")
    assert len(str(caught.value)) < 400  # the message does not repeat the data


@pytest.mark.parametrize("path", ["/ok.wav", "/with blank.wav?key=a%2Fb", "/moved.wav"])
def test_url(server, path):
    np.testing.assert_array_equal(load_audio(server + path), EXPECTED)
    np.testing.assert_array_equal(load_audio(server.replace("http", "HTTP") + path), EXPECTED)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/absent.wav", r"absent\.wav.*404"),
        ("/broken.wav", "500"),
        ("/to_file.wav", "302"),
        ("/to_ftp.wav", "ftp"),
        ("/loop.wav", "302"),
        ("/short.wav", rf"after {len(WAV)} of {len(WAV) + 100} bytes"),
        ("/page.wav", "not audio"),
    ],
)
def test_url_that_fails(server, path, message):
    with pytest.raises(AudioError, match=message):
        load_audio(server + path)


@pytest.mark.parametrize("announce", [True, False])
def test_url_that_is_too_large(server, announce, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOWNLOAD_BYTES", len(WAV) - 1)
    if not announce:
        monkeypatch.setitem(ANSWERS, "/ok.wav", (200, {"Content-Length": "unknown"}, WAV))
    with pytest.raises(AudioError, match="MAX_DOWNLOAD_BYTES"):
        load_audio(server + "/ok.wav")


def test_url_whose_server_is_silent(monkeypatch):
    import socket

    monkeypatch.setattr(sources, "URL_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(AudioError, match="timed out"):
            load_audio(f"http://127.0.0.1:{port}/clip.wav")
    with pytest.raises(AudioError, match="refused"):
        load_audio(f"http://127.0.0.1:{port}/clip.wav")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("file:///audio/clip.wav", "Pass the path itself"),
        ("file:clip.wav", "Pass the path itself"),
        ("ftp://example.org/clip.wav", "only http and https"),
        ("s3://bucket/clip.wav", "only http and https"),
        ("http://", "cannot be reached"),
        ("http://127.0.0.1:port/clip.wav", "cannot be reached"),
    ],
)
def test_addresses_that_are_refused(address, message):
    with pytest.raises(AudioError, match=message):
        load_audio(address)


@pytest.mark.parametrize("source", [None, 42, [0.1, 0.2], {"name": "clip.wav"}])
def test_sources_of_another_type(source):
    with pytest.raises(ArgumentError, match=type(source).__name__):
        load_audio(source)

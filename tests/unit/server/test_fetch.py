"""Addresses in requests lead nowhere but to allowed, public hosts."""

from __future__ import annotations

import http.server
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from audioflamingo.server import fetch
from audioflamingo.server.error_replies import ApiError
from audioflamingo.server.fetch import Fetcher, is_public
from tests.server_runs import RunningServer, chat_body, running_server, wav

PUBLIC = "93.184.216.34"


class Handler(http.server.BaseHTTPRequestHandler):
    """Audio, redirects, a file without end, and one that comes slowly."""

    def do_GET(self) -> None:
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(bytes(65536))
            elif self.path == "/slow":
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.05)
            else:
                self.wfile.write(wav())
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def resolve(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]) -> list[str]:
    """Lets names resolve as told, and returns a list of what was looked up."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *options: Any, **more: Any) -> list[Any]:
        if host == "127.0.0.1":
            return real(host, port, *options, **more)
        asked.append(host)
        if host not in names:
            raise socket.gaierror("unknown name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names[host]]

    monkeypatch.setattr(fetch.socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.fixture
def lead_to_loopback(monkeypatch: pytest.MonkeyPatch, port: int) -> list[str]:
    """The public address is this test's server, so that good fetches can be tried; returns where connections went."""
    connected: list[str] = []
    connect = socket.create_connection

    def create_connection(address: tuple[str, int], *options: Any) -> socket.socket:
        connected.append(address[0])
        assert address[0] == PUBLIC, f"connected to {address}"
        return connect(("127.0.0.1", port), *options)

    monkeypatch.setattr(fetch.socket, "create_connection", create_connection)
    return connected


def refused(url: str, fetcher: Fetcher | None = None) -> str:
    with pytest.raises(ApiError) as error:
        (fetcher or Fetcher(["*"], 1_000_000, 5.0)).fetch(url)
    assert error.value.status == 400
    assert error.value.code == "url_not_allowed"
    return error.value.message


def test_fetching_is_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = resolve(monkeypatch, {"audio.example": [PUBLIC]})
    assert "off on this server" in refused("https://audio.example/a.wav", Fetcher([], 1000, 1.0))
    assert asked == []


def test_an_allowed_host_is_fetched_from(
    monkeypatch: pytest.MonkeyPatch, lead_to_loopback: list[str]
) -> None:
    resolve(monkeypatch, {"audio.example": [PUBLIC]})
    for allowed in ("audio.example", "*"):
        assert Fetcher([allowed], 1_000_000, 5.0).fetch("http://audio.example/a.wav?x=1") == wav()
    assert "that host" in refused("http://other.example/a.wav", Fetcher(["audio.example"], 1000, 1.0))
    assert "that host" in refused("http://audio.example:8080/a.wav", Fetcher(["audio.example"], 1000, 1.0))
    assert "that host" in refused("http://audio.example.evil.example/", Fetcher(["audio.example"], 1000, 1.0))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.9.10", "10.0.0.1", "172.16.5.4", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1", "198.18.0.1"),
        *(
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "fd00:ec2::254",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
        ),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:0:53aa:64c::1"),
    ],
)
def test_a_name_that_leads_inside_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    resolve(monkeypatch, {"inside.example": [address], "both.example": [PUBLIC, address]})
    for name in ("inside.example", "both.example"):
        assert "public host" in refused(f"http://{name}/a.wav")


def test_public_addresses_are_public() -> None:
    for address in (PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "[::ffff:7f00:1]", "localhost"],
)
def test_all_spellings_of_loopback_are_refused(host: str) -> None:
    """Without a stand-in: the system's own resolver reads decimal, octal and hexadecimal forms."""
    message = refused(f"http://{host}/a.wav")
    assert "public host" in message or "cannot be fetched" in message


@pytest.mark.parametrize(
    "url",
    [
        *(
            "file:///etc/passwd",
            "FILE:///etc/passwd",
            "ftp://audio.example/a",
            "gopher://audio.example/",
            "/etc/passwd",
        ),
        *(
            "http://",
            "http:///a",
            "http://user:pw@audio.example/a",
            "http://audio.example:99999/",
            "http://[::1/",
        ),
        *("javascript:alert(1)", "", "http://audio.example\\@127.0.0.1/"),
    ],
)
def test_other_schemes_and_broken_addresses_are_refused(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    resolve(monkeypatch, {"audio.example": [PUBLIC], "audio.example\\": [PUBLIC]})
    refused(url)


def test_every_redirect_is_checked_again(
    monkeypatch: pytest.MonkeyPatch, lead_to_loopback: list[str], port: int
) -> None:
    resolve(monkeypatch, {"audio.example": [PUBLIC], "inside.example": ["10.0.0.1"]})
    fetcher = Fetcher(["*"], 1_000_000, 5.0)
    assert fetcher.fetch("http://audio.example/to?/a.wav") == wav()
    for target in (
        f"http://127.0.0.1:{port}/",
        "http://127.0.0.1/",
        "http://inside.example/",
        "file:///etc/passwd",
    ):
        refused(f"http://audio.example/to?{target}", fetcher)
    assert set(lead_to_loopback) == {PUBLIC}
    loop = "http://audio.example/to?/to?/to?/to?/to?/a.wav"
    assert "redirects more than" in refused(loop, fetcher)


def test_the_checked_address_is_the_one_connected_to(
    monkeypatch: pytest.MonkeyPatch, lead_to_loopback: list[str]
) -> None:
    """A name that means something else the second time (DNS rebinding) is asked for once only."""
    asked = resolve(monkeypatch, {"audio.example": [PUBLIC]})
    Fetcher(["audio.example"], 1_000_000, 5.0).fetch("http://audio.example/a.wav")
    assert asked == ["audio.example"]
    assert lead_to_loopback == [PUBLIC]


def test_size_and_time_are_limited(monkeypatch: pytest.MonkeyPatch, lead_to_loopback: list[str]) -> None:
    resolve(monkeypatch, {"audio.example": [PUBLIC]})
    assert "larger than" in refused("http://audio.example/endless", Fetcher(["*"], 100_000, 5.0))
    start = time.monotonic()
    refused("http://audio.example/slow", Fetcher(["*"], 100_000, 0.3))
    assert time.monotonic() - start < 3
    assert "status 404" in refused("http://audio.example/missing")


def test_through_the_server(server: RunningServer, model: Any, processor: Any) -> None:
    part = {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:1/a.wav"}}
    with server.client() as client:
        reply = client.post("/v1/chat/completions", json=chat_body(part))
        assert reply.status_code == 400
        assert "off on this server" in reply.json()["error"]["message"]
        part["audio_url"] = {"url": "file:///etc/passwd"}
        assert client.post("/v1/chat/completions", json=chat_body(part)).status_code == 400
    with running_server(model, processor, fetch_hosts=("*",)) as open_server, open_server.client() as client:
        part["audio_url"] = {"url": f"{open_server.url}/health"}
        reply = client.post("/v1/chat/completions", json=chat_body(part))
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "url_not_allowed"

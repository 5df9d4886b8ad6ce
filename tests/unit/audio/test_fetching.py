"""Addresses in requests lead nowhere but to allowed, public hosts."""

from __future__ import annotations

import dataclasses
import http.server
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from audioflamingo.audio import fetching
from audioflamingo.audio.fetching import FetchPolicy, fetch, is_public
from audioflamingo.errors import FetchError
from tests.support.audio_files import encode, tone

socket_connect = socket.create_connection
PUBLIC = "93.184.216.34"
WAV = encode(tone(1.0), 16000, "wav")


def policy(hosts: list[str] | None = None, max_bytes: int = 1_000_000, total_s: float = 5.0) -> FetchPolicy:
    """As a server has one."""
    return FetchPolicy(
        max_bytes,
        wait_s=total_s,
        total_s=total_s,
        allowed_hosts=["*"] if hosts is None else hosts,
        max_redirects=3,
    )


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
                self.wfile.write(WAV)
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

    monkeypatch.setattr(fetching.socket, "getaddrinfo", getaddrinfo)
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

    monkeypatch.setattr(fetching.socket, "create_connection", create_connection)
    return connected


def refused(url: str, limits: FetchPolicy | None = None) -> str:
    with pytest.raises(FetchError) as error:
        fetch(url, limits or policy())
    return str(error.value)


def test_fetching_is_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = resolve(monkeypatch, {"audio.example": [PUBLIC]})
    assert "off on this server" in refused("https://audio.example/a.wav", policy([], 1000, 1.0))
    assert asked == []


def test_an_allowed_host_is_fetched_from(
    monkeypatch: pytest.MonkeyPatch, lead_to_loopback: list[str]
) -> None:
    resolve(monkeypatch, {"audio.example": [PUBLIC]})
    for allowed in ("audio.example", "*"):
        assert fetch("http://audio.example/a.wav?x=1", policy([allowed])).read() == WAV
    assert "that host" in refused("http://other.example/a.wav", policy(["audio.example"], 1000, 1.0))
    assert "that host" in refused("http://audio.example:8080/a.wav", policy(["audio.example"], 1000, 1.0))
    assert "that host" in refused("http://audio.example.evil.example/", policy(["audio.example"], 1000, 1.0))


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
    assert "public host" in message or "cannot be reached" in message


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
    limits = policy()
    assert fetch("http://audio.example/to?/a.wav", limits).read() == WAV
    for target in (
        f"http://127.0.0.1:{port}/",
        "http://127.0.0.1/",
        "http://inside.example/",
        "file:///etc/passwd",
        "http://[::1/",
        "http://",
    ):
        refused(f"http://audio.example/to?{target}", limits)
    assert set(lead_to_loopback) == {PUBLIC}
    loop = "http://audio.example/to?/to?/to?/to?/to?/a.wav"
    assert "redirects more than" in refused(loop, limits)


def test_the_checked_address_is_the_one_connected_to(
    monkeypatch: pytest.MonkeyPatch, lead_to_loopback: list[str]
) -> None:
    """A name that means something else the second time (DNS rebinding) is asked for once only."""
    asked = resolve(monkeypatch, {"audio.example": [PUBLIC]})
    fetch("http://audio.example/a.wav", policy(["audio.example"]))
    assert asked == ["audio.example"]
    assert lead_to_loopback == [PUBLIC]


def test_size_and_time_are_limited(monkeypatch: pytest.MonkeyPatch, lead_to_loopback: list[str]) -> None:
    resolve(monkeypatch, {"audio.example": [PUBLIC]})
    assert "larger than" in refused("http://audio.example/endless", policy(["*"], 100_000, 5.0))
    start = time.monotonic()
    refused("http://audio.example/slow", policy(["*"], 100_000, 0.3))
    assert time.monotonic() - start < 3
    assert "status 404" in refused("http://audio.example/missing")


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    """A proxy for plain http that says what it was asked for."""

    def do_GET(self) -> None:
        body = f"{self.path} {self.headers['Host']} {self.headers['Proxy-Authorization']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_the_proxy_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, lead_to_loopback: list[str], port: int
) -> None:
    """Used where every address is allowed; never where addresses are checked, as a proxy would hide them."""
    with http.server.HTTPServer(("127.0.0.1", 0), ProxyHandler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://me:a%20b@127.0.0.1:{proxy.server_port}")
        monkeypatch.delenv("no_proxy", raising=False)
        resolve(monkeypatch, {"audio.example": [PUBLIC]})
        monkeypatch.setattr(fetching.socket, "create_connection", socket_connect)
        anywhere = FetchPolicy(1000, wait_s=5.0, allows_private=True)
        answer = fetch("http://audio.example/a b.wav?x=1", anywhere).read().decode()
        assert answer == "http://audio.example/a%20b.wav?x=1 audio.example Basic bWU6YSBi"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert (
            fetch(f"http://127.0.0.1:{port}/a.wav", dataclasses.replace(anywhere, max_bytes=10**6)).read()
            == WAV
        )
        assert "public host" in refused("http://127.0.0.1/a.wav")
        proxy.shutdown()


def test_the_next_address_is_tried(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """A host whose first address (often IPv6) leads nowhere from here."""
    tried: list[str] = []

    def create_connection(address: tuple[str, int], *options: Any) -> socket.socket:
        tried.append(address[0])
        if address[0] != PUBLIC:
            raise OSError("no route to host")
        return socket_connect(("127.0.0.1", port), *options)

    resolve(monkeypatch, {"audio.example": ["93.184.216.35", PUBLIC]})
    monkeypatch.setattr(fetching.socket, "create_connection", create_connection)
    assert fetch("http://audio.example/a.wav", policy()).read() == WAV
    assert tried == ["93.184.216.35", PUBLIC]

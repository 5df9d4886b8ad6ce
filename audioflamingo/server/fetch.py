"""Fetches audio from addresses in requests, without being led to where the server must not look.

Off unless hosts are allowed by name. A name is resolved once, every address it gives is checked, and the connection
goes to the address that was checked, so that a name which changes its mind in between gains nothing. The same holds
after each redirect.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

from audioflamingo.server.error_replies import ApiError, bad_request

MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"http": 80, "https": 443}
READ_BYTES = 1 << 16
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Fetcher:
    """Fetches over http and https.

    Args:
        allowed_hosts: host names, or `host:port` for other ports than 80 and 443; `*` is every public host.
        max_bytes: largest answer.
        timeout_s: longest time for a whole fetch, redirects included.
    """

    def __init__(self, allowed_hosts: Sequence[str], max_bytes: int, timeout_s: float) -> None:
        self._allowed = {host.lower().rstrip(".") for host in allowed_hosts}
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    def fetch(self, url: str) -> bytes:
        """Downloads; blocking, for worker threads only.

        Raises:
            ApiError: 400 if it is not allowed or does not work.
        """
        end = time.monotonic() + self._timeout_s
        for _ in range(MAX_REDIRECTS + 1):
            parts = self._check_url(url)
            try:
                location, body = self._request(parts, end)
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                raise _refused(f"the address cannot be fetched ({type(error).__name__})") from None
            if location is None:
                return body
            url = urljoin(url, location)
        raise _refused(f"the address redirects more than {MAX_REDIRECTS} times")

    def _check_url(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise _refused("the address cannot be read") from None
        if parts.scheme not in PORTS:
            raise _refused("only data:, http: and https: addresses are taken")
        if not host or parts.username is not None or parts.password is not None:
            raise _refused("the address must name a host and no user")
        host = host.lower().rstrip(".")
        if not self._allowed:
            raise _refused("fetching over http(s) is off on this server; send the audio as base64")
        wanted = host if port in (None, 80, 443) else f"{host}:{port}"
        if wanted not in self._allowed and not ("*" in self._allowed and wanted == host):
            raise _refused("this server does not fetch from that host; send the audio as base64")
        return parts

    def _request(self, parts: SplitResult, end: float) -> tuple[str | None, bytes]:
        """One request: where it redirects to, or its body."""
        assert parts.hostname is not None
        port = parts.port or PORTS[parts.scheme]
        address = resolve_public(parts.hostname, port)
        connection = PinnedConnection(parts.hostname, port, address, parts.scheme == "https", _left(end))
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"User-Agent": "audioflamingo", "Accept": "audio/*", "Accept-Encoding": "identity"}
            connection.request("GET", path, headers=headers)
            socket_ = connection.sock  # http.client lets go of it where the answer ends with the connection
            response = connection.getresponse()
            if response.status in REDIRECTS:
                return response.getheader("Location", ""), b""
            if response.status != 200:
                raise _refused(f"the other server answered with status {response.status}")
            return None, self._read(response, socket_, end)
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse, socket_: socket.socket, end: float) -> bytes:
        announced = response.getheader("Content-Length", "")
        body = b""
        if announced.isdigit() and int(announced) > self._max_bytes:
            raise _refused(f"the file is larger than {self._max_bytes} bytes")
        while True:
            socket_.settimeout(_left(end))
            block = response.read1(READ_BYTES)
            if not block:
                return body
            body += block
            if len(body) > self._max_bytes:
                raise _refused(f"the file is larger than {self._max_bytes} bytes")


class PinnedConnection(http.client.HTTPConnection):
    """A connection to a checked address, under the host's name."""

    def __init__(self, host: str, port: int, address: Address, is_tls: bool, timeout_s: float) -> None:
        super().__init__(host, port, timeout=timeout_s)
        self._address = address
        self._is_tls = is_tls

    def connect(self) -> None:
        """Connects to the address, not to whatever the name means now."""
        self.sock = socket.create_connection((str(self._address), self.port), self.timeout)
        if self._is_tls:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


def resolve_public(host: str, port: int) -> Address:
    """The first address of a host name, if every one of them is public.

    Raises:
        ApiError: 400 if one is not.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise _refused("the address does not lead to a public host")
    return addresses[0]


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet; IPv4 addresses within IPv6 ones are looked at too."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.teredo is not None:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _left(end: float) -> float:
    """Seconds that are left."""
    left_s = end - time.monotonic()
    if left_s <= 0:
        raise _refused("fetching the address takes too long")
    return left_s


def _refused(reason: str) -> ApiError:
    return bad_request(f"audio_url: {reason}.", "audio_url", "url_not_allowed")

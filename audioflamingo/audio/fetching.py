"""Fetches a file over http and https, within a policy: which hosts, whether private addresses, how much, how long.

A name is resolved once, every address it gives is checked, and the connection goes to an address that was checked, so
that a name which changes its mind in between gains nothing. The same holds after each redirect.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import math
import socket
import ssl
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, cast
from urllib.parse import SplitResult, urljoin, urlsplit

from audioflamingo.errors import FetchError

SPOOL_BYTES = 32 * 1024**2  # files beyond this go to a temporary file on disk
READ_BYTES = 1 << 16
REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.ip_network("64:ff9b::/96")
HEADERS = {
    "User-Agent": "audioflamingo",
    "Accept": "audio/*, */*;q=0.8",
    "Accept-Encoding": "identity",
}
UNCHANGED = "%/:?#[]@!$&'()*+,;=~"  # characters of an address that are not quoted

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class FetchPolicy:
    """What may be fetched.

    Attributes:
        max_bytes: largest file.
        wait_s: longest wait for a connection or for the next bytes.
        total_s: longest time for a whole fetch, redirects included.
        allowed_hosts: host names, or `host:port` for other ports than 80 and 443; `*` is every host on those ports.
            None allows every host and port; an empty list turns fetching off.
        allows_private: whether addresses that are not on the public internet may be fetched from. Only then are the
            proxies of the environment used (`https_proxy`): what a proxy connects to cannot be checked.
        max_redirects: how many are followed.
        limit_name: what `max_bytes` is called where it is set, for messages.
        advice: the last sentence of every message.
    """

    max_bytes: int
    wait_s: float
    total_s: float = math.inf
    allowed_hosts: Sequence[str] | None = None
    allows_private: bool = False
    max_redirects: int = 10
    limit_name: str = "max_bytes"
    advice: str = "Check that the address is right."

    def check(self, url: str) -> SplitResult:
        """Takes an address apart.

        Raises:
            FetchError: it is broken or not allowed.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise self.refusal(url, f"the address cannot be reached ({error})") from None
        if parts.scheme not in PORTS:
            scheme = f", not {parts.scheme}" if parts.scheme else ""
            raise self.refusal(url, f"only http and https addresses are fetched{scheme}")
        if not host or parts.username is not None or parts.password is not None:
            raise self.refusal(url, "the address cannot be reached (it must name a host and no user)")
        if self.allowed_hosts is None:
            return parts
        allowed = {name.lower().rstrip(".") for name in self.allowed_hosts}
        if not allowed:
            raise self.refusal(url, "fetching over http(s) is off on this server")
        is_usual = port in (None, *PORTS.values())
        wanted = host.lower().rstrip(".") + ("" if is_usual else f":{port}")
        if wanted not in allowed and not ("*" in allowed and is_usual):
            raise self.refusal(url, "this server does not fetch from that host")
        return parts

    def resolve(self, url: str, host: str, port: int) -> list[str]:
        """Addresses of a host name, if every one of them is allowed.

        Raises:
            FetchError: one is not.
            OSError: the name is unknown.
        """
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if self.allows_private:
            return addresses
        if not addresses or not all(
            is_public(ipaddress.ip_address(text.partition("%")[0])) for text in addresses
        ):
            raise self.refusal(url, "the address does not lead to a public host")
        return addresses

    def refusal(self, url: str, reason: str) -> FetchError:
        """The error for an address, not raised."""
        return FetchError(f"{shorten(url)}: {reason}. {self.advice}", reason)

    def too_large(self, url: str) -> FetchError:
        """The error for a file that is too large, not raised."""
        return self.refusal(url, f"the file is larger than {self.max_bytes} bytes ({self.limit_name})")


class Reply(NamedTuple):
    """Where an address redirects to, or the file that it gave."""

    status: int
    location: str
    file: BinaryIO | None


def fetch(url: str, policy: FetchPolicy) -> BinaryIO:
    """Downloads a file; blocking.

    Returns:
        A file that can be sought in, at its start: in memory while small, on disk beyond `SPOOL_BYTES`.

    Raises:
        FetchError: the policy does not allow it, or it does not work.
    """
    end = time.monotonic() + policy.total_s
    target, status = url, 0
    for _ in range(policy.max_redirects + 1):
        try:
            reply = _request(target, policy, end)
            if reply.file is not None:
                return reply.file
            target, status = urljoin(target, reply.location), reply.status
        except FetchError as error:
            if not status:
                raise
            raise policy.refusal(url, f"it redirects (status {status}): {error.reason}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise policy.refusal(url, f"the address cannot be reached ({reason})") from error
    raise policy.refusal(url, f"it redirects more than {policy.max_redirects} times (status {status})")


def _request(url: str, policy: FetchPolicy, end: float) -> Reply:
    """One request."""
    parts = policy.check(url)
    connection, path, headers = _connection(url, parts, policy, end)
    try:
        connection.request("GET", path, headers={**HEADERS, **headers})
        socket_ = connection.sock  # http.client lets go of it where the answer ends with the connection
        response = connection.getresponse()
        if response.status in REDIRECTS:
            return Reply(response.status, response.getheader("Location", ""), None)
        if not 200 <= response.status < 300:
            status = f"{response.status} ({response.reason})"
            raise policy.refusal(url, f"the server answered with status {status}")
        return Reply(response.status, "", _read(url, response, socket_, policy, end))
    finally:
        connection.close()


def _connection(
    url: str, parts: SplitResult, policy: FetchPolicy, end: float
) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """A connection for an address, what to ask it for, and headers: of a proxy, if the environment names one."""
    assert parts.hostname is not None
    host, port, is_tls = parts.hostname, parts.port or PORTS[parts.scheme], parts.scheme == "https"
    path = urllib.parse.quote(parts.path or "/", safe=UNCHANGED)
    if parts.query:
        path += "?" + urllib.parse.quote(parts.query, safe=UNCHANGED)
    timeout_s = _left(url, policy, end)
    proxy = _proxy(parts) if policy.allows_private else None
    if proxy is None or proxy.hostname is None:
        addresses = policy.resolve(url, host, port)
        return PinnedConnection(host, port, addresses, is_tls, timeout_s), path, {}
    headers = {}
    if proxy.username is not None:
        login = urllib.parse.unquote_to_bytes(f"{proxy.username}:{proxy.password or ''}")
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(login).decode()}"
    proxy_port = proxy.port or PORTS["http"]
    if is_tls:
        tunnel = http.client.HTTPSConnection(proxy.hostname, proxy_port, timeout=timeout_s)
        tunnel.set_tunnel(host, port, headers)
        return tunnel, path, {}
    plain = http.client.HTTPConnection(proxy.hostname, proxy_port, timeout=timeout_s)
    return plain, f"http://{parts.netloc}{path}", headers


def _proxy(parts: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for an address."""
    address = urllib.request.getproxies().get(parts.scheme)
    if not address or urllib.request.proxy_bypass(parts.netloc):
        return None
    return urlsplit(address if "://" in address else f"http://{address}")


def _read(
    url: str, response: http.client.HTTPResponse, socket_: socket.socket, policy: FetchPolicy, end: float
) -> BinaryIO:
    announced = response.getheader("Content-Length", "")
    if announced.isdigit() and int(announced) > policy.max_bytes:
        raise policy.too_large(url)
    file, num_bytes = new_spool(), 0
    try:
        while True:
            socket_.settimeout(_left(url, policy, end))
            if not (block := response.read1(READ_BYTES)):
                break
            num_bytes += len(block)
            if num_bytes > policy.max_bytes:
                raise policy.too_large(url)
            file.write(block)
        if announced.isdigit() and num_bytes < int(announced):
            raise policy.refusal(url, f"the connection closed after {num_bytes} of {announced} bytes")
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


class PinnedConnection(http.client.HTTPConnection):
    """A connection to one of some checked addresses, under the host's name."""

    def __init__(
        self, host: str, port: int, addresses: Sequence[str], is_tls: bool, timeout_s: float
    ) -> None:
        super().__init__(host, port, timeout=timeout_s)
        self._addresses = addresses
        self._is_tls = is_tls

    def connect(self) -> None:
        """Connects to the first address that answers, not to whatever the name means now."""
        for number, address in enumerate(self._addresses, start=1):
            try:
                self.sock = socket.create_connection((address, self.port), self.timeout)
                break
            except OSError:
                if number == len(self._addresses):
                    raise
        if self._is_tls:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


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


def new_spool() -> BinaryIO:
    """A temporary file: in memory while small, on disk beyond `SPOOL_BYTES`."""
    return cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES))


def shorten(text: str, limit: int = 200) -> str:
    """A source's name for messages, in quotes."""
    return repr(text if len(text) <= limit else f"{text[:limit]}...")


def _left(url: str, policy: FetchPolicy, end: float) -> float:
    """Seconds that the next wait may last."""
    left_s = end - time.monotonic()
    if left_s <= 0:
        raise policy.refusal(url, "fetching the address takes too long")
    return min(left_s, policy.wait_s)

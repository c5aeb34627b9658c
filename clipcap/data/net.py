"""Fetch a file from a public address of the web, and from no other."""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import time
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import urllib3

REDIRECTS = 5


class Dropped(Exception):
    """Why a URL gives no image."""

    def __init__(self, reason: str, *, again: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.again, self.wait = reason, again, wait


def public_address(host: str, port: int, *, allow_private: bool = False) -> str:
    """Resolve a host and return its first address.

    Raises:
        Dropped: it has none, or one that is not public: loopback, private, link-local, multicast, reserved, or one
            of these inside an IPv6 address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Dropped("host not found", again=True) from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses if not allow_private else ():
        if not is_public(address):
            raise Dropped("address is not public")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address, and any IPv4 address that it wraps, is on the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    wrapped: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.is_site_local:
            return False
        wrapped = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96") or int(ip) >> 32 == 0:  # NAT64; IPv4-compatible
            wrapped.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    if any(inner is not None and not is_public(str(inner)) for inner in wrapped):
        return False
    if any(inner is not None for inner in wrapped):
        return True
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def fetch(url: str, *, timeout: float, max_bytes: int, allow_private: bool = False) -> bytes:
    """The bytes at a URL. Every redirect is checked as the URL itself is, and the connection goes to the very address
    that was checked, without a proxy.

    Raises:
        Dropped: anything that keeps it from coming.
    """
    deadline = time.monotonic() + timeout
    for _ in range(REDIRECTS + 1):
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
            host = parts.hostname
        except ValueError:
            raise Dropped("not a URL") from None
        if parts.scheme not in ("http", "https") or not host:
            raise Dropped("not an http(s) URL")
        address = public_address(host, port, allow_private=allow_private)
        target = quote(parts.path or "/", safe="/%:=&+!$,;'()*~@") + (
            f"?{quote(parts.query, safe='/%:=&?+!$,;()*~@')}" if parts.query else ""
        )
        try:
            with _pool(parts.scheme, host, address, port, deadline) as pool:
                response = pool.request(
                    "GET", target, headers=_headers(host, port), redirect=False, retries=False, preload_content=False
                )
                try:
                    if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
                        url = urljoin(url, response.headers["Location"])
                        continue
                    return _body(response, max_bytes)
                finally:
                    response.close()
        except (TimeoutError, urllib3.exceptions.TimeoutError):
            raise Dropped("timeout", again=True) from None
        except (urllib3.exceptions.SSLError, urllib3.exceptions.LocationParseError):
            raise Dropped("no secure connection") from None
        except (urllib3.exceptions.HTTPError, OSError, ValueError):
            raise Dropped("connection failed", again=True) from None
    raise Dropped("too many redirects")


def _pool(scheme: str, host: str, address: str, port: int, deadline: float) -> urllib3.HTTPConnectionPool:
    """Connections to `address` that are secured and addressed as `host`, and give nothing after `deadline`."""
    limit = urllib3.Timeout(total=_left(deadline))
    if scheme == "http":
        pool = urllib3.HTTPConnectionPool(address, port, timeout=limit)
    else:
        pool = urllib3.HTTPSConnectionPool(
            address, port, timeout=limit, cert_reqs="CERT_REQUIRED", server_hostname=host, assert_hostname=host
        )
    base: Any = pool.ConnectionCls

    def respond(sock: socket.socket, *args: Any, **options: Any) -> http.client.HTTPResponse:
        response: Any = http.client.HTTPResponse(sock, *args, **options)
        response.fp = io.BufferedReader(_Bounded(sock, response.fp.detach(), deadline))
        return response

    class Connection(base):  # type: ignore[misc]
        response_class = staticmethod(respond)

        def _new_conn(self) -> socket.socket:
            sock = super()._new_conn()
            sock.settimeout(_left(deadline))  # of the whole handshake
            return sock

    pool.ConnectionCls = Connection
    return pool


class _Bounded(io.RawIOBase):
    """What comes through a socket until a deadline: the socket's own timeout is of each read alone."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, deadline: float) -> None:
        self.sock, self.raw, self.deadline = sock, raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.sock.settimeout(_left(self.deadline))
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


def _left(deadline: float) -> float:
    """Seconds to a deadline; TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _headers(host: str, port: int) -> dict[str, str]:
    name = f"[{host}]" if ":" in host else host
    return {
        "Host": name if port in (80, 443) else f"{name}:{port}",
        "User-Agent": "clipcap-download",
        "Accept": "image/*,*/*;q=0.5",
        "Accept-Encoding": "identity",  # nothing that grows when it is unpacked
    }


def _body(response: urllib3.BaseHTTPResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        asked = response.headers.get("Retry-After", "")
        again = response.status in (408, 425, 429) or response.status >= 500
        raise Dropped(f"HTTP {response.status}", again=again, wait=float(asked) if asked.isdigit() else 0.0)
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise Dropped("too large")
    data = bytearray()
    for chunk in response.stream(1 << 16, decode_content=False):
        data += chunk
        if len(data) > max_bytes:
            raise Dropped("too large")
    return bytes(data)

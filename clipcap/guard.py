"""What a request to the page of `clipcap serve` may ask: from where, of which route, how much, and of which files.

gradio serves every route that it knows to everyone who can reach the port. `Guard` lies before all of them, and lets
through what the page, gradio_client and `/caption` need.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

READ = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)|/(assets|static)/.+"
    r"|/gradio_api/(info|startup-events|queue/data|heartbeat/[\w-]{1,64}|call/caption/[\w-]{1,64}|file=.+)"
)
"""What may be read."""
FILE, UPLOAD = "/gradio_api/file=", "/gradio_api/upload"
CALLS = ("/gradio_api/queue/join", "/gradio_api/call/caption")
WRITE = ("/caption", UPLOAD, *CALLS)
"""What may be posted."""
WITH_QUERY = ("/caption", "/gradio_api/queue/data")
"""Routes that need what stands behind "?"; the others could keep it in memory, or read files that it names."""
CALL_BYTES = 1 << 16
"""Largest call: settings and the name of a file."""
BODY_SECONDS = 120
"""Longest time that sending a request may take."""
MOST_REQUESTS = 256
"""Answered at the same time; a page that is open is one."""
MOST_POSTS = 32
"""Uploads, calls and images for `/caption` at the same time."""
MOST_UPLOADS = 100
"""Files that are kept, the newest."""
KEPT_SECONDS = 3600
"""Longest time that a file is kept."""
NOT_UPLOADED = "This image is not among the uploads: upload it (again)."


class Uploads:
    """The folder of uploaded files: the newest `MOST_UPLOADS`, each for `KEPT_SECONDS` at most."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def __contains__(self, path: object) -> bool:
        """Whether `path` is a file of the folder, links followed."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # of paths that none can have
            real = Path(str(path)).resolve()
            return real.is_relative_to(self.folder) and real.is_file()
        return False

    def tidy(self) -> None:
        """Delete what is too old or too much."""
        found = []
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):  # it is gone, or not empty
                written = path.lstat().st_mtime
                if not path.is_dir():
                    found.append((written, path))
                elif time.time() - written > 60:  # gradio made it for a file that has come by now
                    path.rmdir()
        found.sort()
        for number, (written, path) in enumerate(found):
            if len(found) - number > MOST_UPLOADS or time.time() - written > KEPT_SECONDS:
                path.unlink(missing_ok=True)


class Guard:
    """An ASGI application that hands to `app` the requests that are allowed, and refuses the others."""

    def __init__(
        self, app: App, uploads: Uploads, *, host: str, allow_host: Iterable[str] = (), max_bytes: int
    ) -> None:
        """
        Args:
            app: what answers.
            uploads: the files that may be read.
            host: address that the server listens on.
            allow_host: more names that it may be called by.
            max_bytes: of an image.
        """
        self.app, self.uploads, self.max_bytes = app, uploads, max_bytes
        self.local = _is_loopback(host)
        self.names = {"localhost", "127.0.0.1", "::1", host.lower(), *(name.lower() for name in allow_host)}
        if not self.local:
            own = socket.gethostname().lower()
            self.names |= {own, f"{own}.local"}
        self.requests = self.posts = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        posts = scope["method"] == "POST"
        self.requests, self.posts = self.requests + 1, self.posts + posts
        try:
            if self.requests > MOST_REQUESTS or self.posts > MOST_POSTS:
                raise HTTPException(503, "The server is busy: try again later.")
            self._check_sender(scope)
            scope, receive = await self._check_request(dict(scope), receive)
        except HTTPException as error:
            await JSONResponse({"detail": error.detail}, error.status_code)(scope, receive, send)
        else:
            await self.app(scope, receive, send)
        finally:
            self.requests, self.posts = self.requests - 1, self.posts - posts

    def _check_sender(self, scope: Scope) -> None:
        """Refuse requests under a foreign name (DNS rebinding), and those that another site's page makes."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        name = _host_name(host)
        if name not in self.names and (self.local or not _is_address(name)):
            raise HTTPException(403, f"This server is not called {name!r}: add --allow-host to let the name in.")
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host:
            raise HTTPException(403, "Requests from the pages of other sites are refused.")
        followed = scope["path"] == "/" and headers.get("sec-fetch-dest") == "document"  # a link to the page
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not followed:
            raise HTTPException(403, "Requests from the pages of other sites are refused.")

    async def _check_request(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """The request without what no route needs; HTTPException for one that is not allowed."""
        method, path = scope["method"], scope["path"]
        if path not in WITH_QUERY:
            scope["query_string"] = b""
        if method in ("GET", "HEAD") and READ.fullmatch(path):
            if path.startswith(FILE) and path.removeprefix(FILE) not in self.uploads:
                raise HTTPException(404, NOT_UPLOADED)
            return scope, receive
        if method != "POST" or path not in WRITE:
            raise HTTPException(404, "There is nothing here.")
        if path in CALLS:
            return scope, await self._check_call(_bounded(receive, CALL_BYTES))
        await anyio.to_thread.run_sync(self.uploads.tidy)
        around = 1 << 16  # what a form puts around a file
        return scope, _bounded(receive, self.max_bytes + around)

    async def _check_call(self, receive: Receive) -> Receive:
        """The call with nothing but the name of an upload, numbers and words, in which gradio finds nothing to open.

        It would fetch URLs, and open files, that stand anywhere in the data.
        """
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise HTTPException(400, "The request was cut short.")
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            asked = json.loads(body, parse_constant=_refuse_constant)
            image, *settings = asked["data"]
            session = asked.get("session_hash")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise HTTPException(400, 'A call is JSON like {"data": [{"path": ...}, ...]}.') from None
        if not all(value is None or isinstance(value, bool | int | float | str) for value in settings):
            raise HTTPException(400, "The settings of a call are numbers and words.")
        if not (session is None or isinstance(session, str) and re.fullmatch(r"[\w-]{1,64}", session)):
            raise HTTPException(400, "session_hash is up to 64 letters, digits and hyphens.")
        if image is not None:
            path = image.get("path") if isinstance(image, dict) else None
            if path not in self.uploads:
                raise HTTPException(400, NOT_UPLOADED)
            image = {"path": path, "meta": {"_type": "gradio.FileData"}}
        call: dict[str, Any] = {"data": [image, *settings], "session_hash": session, "fn_index": 0}
        if isinstance(asked.get("trigger_id"), int):
            call["trigger_id"] = asked["trigger_id"]
        clean = json.dumps(call).encode()
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": clean, "more_body": False}

        return replay


def _bounded(receive: Receive, most: int) -> Receive:
    """`receive` that gives `most` bytes in `BODY_SECONDS` at most; then it raises HTTPException."""
    taken, done, deadline = 0, False, time.monotonic() + BODY_SECONDS

    async def bounded() -> Message:
        nonlocal taken, done
        while not done:
            try:
                with anyio.fail_after(max(deadline - time.monotonic(), 0)):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"The request was not complete after {BODY_SECONDS} s.") from None
            done = message["type"] != "http.request" or not message.get("more_body")
            taken += len(message.get("body", b""))
            if taken <= most:
                return message
            if done or taken > 4 * most:  # whoever still sends would not read the answer
                done = True
                raise HTTPException(413, "The file is larger than the maximum allowed size.")
        return await receive()

    return bounded


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _netloc(origin: str) -> str:
    with contextlib.suppress(ValueError):
        return urlsplit(origin).netloc.lower()
    return ""


def _host_name(host: str) -> str:
    """Name or address without the port."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(f"//{host}")
        if parts.netloc == host and "@" not in host:
            return parts.hostname or ""
    return ""


def _is_address(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


def _is_loopback(host: str) -> bool:
    return host == "localhost" or _is_address(host) and ipaddress.ip_address(host).is_loopback

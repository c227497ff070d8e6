"""What is checked of every request before it reaches the page: its addresses, its path and its size.

A page of another site that a person opens can send requests to a server on the same machine, and with DNS rebinding it
can also read the answers. Such requests name the other site in `Origin` or `Host`, so both are compared with the names
that the demo is served under.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moss_jax.errors import MossError

BODY_BYTES = 2**20  # of a request that is not an upload: a question with all its settings takes some kB
PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")

# What the page and gradio_client ask for. Gradio has more (monitoring, run history, a proxy to other servers, ...).
PATHS = re.compile(
    r"/(?:config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(?:assets|static|svelte)/.*)?"
    r"|/moss/(?:speech|file)/.*"
    r"|/gradio_api/(?:info/?|app_id/?|theme\.css|startup-events|upload|upload_progress|reset/?|cancel"
    r"|queue/(?:join|data)|call/.*|run/.*|heartbeat/[^/]*|file=.*)"
)
UPLOAD = "/gradio_api/upload"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Door:
    """ASGI middleware that refuses what a stranger's page could send, and everything that the demo does not need.

    Args:
        host: the address that the server is bound to. Bound to a loopback address it is served as localhost and as
            loopback addresses; otherwise as any IP address (a name is needed to rebind it) and as this machine's names.
        allowed: further names that it is served under, such as a proxy's.
        root_path: the path that a proxy puts before the demo's own, such as /demo; with or without it in the request.
            Where it is empty, a well-formed X-Forwarded-Prefix is taken.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: Iterable[str] = (), root_path: str = ""):
        self.app = app
        self.root_path = check_root_path(root_path)
        self._allowed = {check_host_name(name) for name in allowed}
        self._loopback = _is_loopback(host)
        self._own = {"localhost", host.lower()}
        if not self._loopback:
            name = socket.gethostname().lower()
            self._own |= {name, f"{name}.local", socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refused = self._refusal(scope)
        if refused is not None:
            if scope["type"] == "websocket":  # the demo has none
                await send({"type": "websocket.close", "code": 1008})
                return
            status, line = refused
            await PlainTextResponse(line + "\n", status)(scope, receive, send)
            return
        scope = self._rewritten(scope)
        if scope["path"] != UPLOAD:
            receive = limited(receive, BODY_BYTES)
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """HTTP status and one line, or None for a request that is let through."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        host = _authority(hosts[0]) if len(hosts) == 1 else None
        if host is None or not self._serves(host[0]):
            shown = f"as {host[0]}" if host is not None else "under this Host"
            return 421, f"this demo is not served {shown}; if it should be, start it with --allow-host NAME"
        for origin in headers.getlist("origin"):
            if not self._may_call(origin, host):
                return 403, "this demo answers to its own page only; for a proxy's name start it with --allow-host NAME"
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
        elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if changes and elsewhere and "origin" not in headers:
            return 403, "this demo answers to its own page only"
        if scope["type"] == "websocket" or not PATHS.fullmatch(self._own_path(scope["path"])):
            return 404, "there is nothing here"
        return None

    def _serves(self, name: str) -> bool:
        if name in self._own or name in self._allowed:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback if self._loopback else True

    def _may_call(self, origin: str, host: tuple[str, int | None]) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        caller = _authority(parts.netloc)
        if parts.scheme not in ("http", "https") or caller is None:
            return False
        # A proxy may end TLS, so the scheme says nothing, and both ports may be left out.
        return caller[0] in self._allowed or (caller[0] == host[0] and _same_port(caller[1], host[1], parts.scheme))

    def _own_path(self, path: str) -> str:
        """A path without the prefix: some proxies strip it, others do not."""
        if self.root_path and (path + "/").startswith(self.root_path + "/"):
            return path[len(self.root_path) :] or "/"
        return path

    def _rewritten(self, scope: Scope) -> Scope:
        scope = {**scope, "headers": list(scope["headers"])}
        headers = MutableHeaders(scope=scope)
        prefix = self.root_path
        forwarded = headers.get("x-forwarded-prefix", "").rstrip("/")
        if not prefix and PREFIX.fullmatch(forwarded):
            prefix = forwarded
        # Gradio would make the addresses in its answers from these, whoever sent them.
        for name in ("x-forwarded-host", "x-forwarded-prefix", "x-gradio-server"):
            del headers[name]
        path = self._own_path(scope["path"])
        scope["path"] = path
        scope["raw_path"] = path.encode("utf-8")
        scope["root_path"] = prefix
        return scope


def limited(receive: Receive, most: int) -> Receive:
    """A request's messages; HTTP 413 when its body is longer than `most` bytes."""
    taken = 0

    async def counted() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            raise HTTPException(413, f"the request is longer than {most} bytes; recordings are sent to {UPLOAD}")
        return message

    return counted


def check_root_path(path: str) -> str:
    """A path prefix without a slash at its end; empty for none.

    Raises:
        MossError: it is not a path.
    """
    path = path.rstrip("/")
    if path and not PREFIX.fullmatch(path):
        raise MossError(f"--root-path is {path!r}, expected a path such as /demo")
    return path


def check_host_name(name: str) -> str:
    """A host name or address in the form in which it is compared.

    Raises:
        MossError: it has a scheme, a port or a path, or is no name.
    """
    authority = _authority(f"[{name}]" if ":" in name and not name.startswith("[") else name)
    if authority is None or authority[1] is not None:
        raise MossError(f"--allow-host is {name!r}, expected a host's name alone, such as demo.example.org")
    return authority[0]


def _authority(text: str) -> tuple[str, int | None] | None:
    """(name in lower case, port) of a Host header or an origin's authority; None when it is malformed."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{1,5}))?", text.strip())
    if match is None:
        return None
    address, name, port = match.groups()
    return (address or name).lower().rstrip("."), int(port) if port else None


def _same_port(caller: int | None, host: int | None, scheme: str) -> bool:
    usual = 443 if scheme == "https" else 80
    return (caller or usual) == (host or usual)


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

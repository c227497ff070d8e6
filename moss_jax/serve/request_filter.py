"""Checks of every request before it reaches the page: host, origin, path and size.

A page of another site that the user opens can send requests to a server on the same machine, and with DNS rebinding it
can also read the responses. Such requests name the other site in `Origin` or `Host`, so both are compared with the
names that the demo is served under.
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

BODY_BYTES = 2**20  # limit of a request that is not an upload; a question with all settings has a few kB
PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")

# The paths that the page and gradio_client use. Gradio has more (monitoring, run history, a proxy to other servers).
PATHS = re.compile(
    r"/(?:config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(?:assets|static|svelte)/.*)?"
    r"|/moss/(?:speech|file)/.*"
    r"|/gradio_api/(?:info/?|app_id/?|theme\.css|startup-events|upload|upload_progress|reset/?|cancel"
    r"|queue/(?:join|data)|call/.*|run/.*|heartbeat/[^/]*|file=.*)"
)
UPLOAD = "/gradio_api/upload"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class RequestFilter:
    """ASGI middleware that rejects requests of other sites, and all paths that the demo does not need.

    Args:
        host: the address that the server is bound to. On a loopback address, requests for localhost and loopback
            addresses are accepted; otherwise those for any IP address (DNS rebinding needs a name) and for the names
            of this machine.
        allowed: further accepted names, such as that of a proxy.
        root_path: the prefix under which a proxy serves the demo, such as /demo; requests may omit it. If it
            is empty, a well-formed X-Forwarded-Prefix is used.
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
            if scope["type"] == "websocket":  # the demo does not use any
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
        """HTTP status and one line of text; None if the request is accepted."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        host = _authority(hosts[0]) if len(hosts) == 1 else None
        if host is None or not self._serves(host[0]):
            shown = f"as {host[0]}" if host is not None else "under this Host"
            return 421, f"this demo is not served {shown}; if it should be, start it with --allow-host NAME"
        for origin in headers.getlist("origin"):
            if not self._may_call(origin, host):
                return (
                    403,
                    "this demo accepts its own page only; for the name of a proxy, start it with --allow-host NAME",
                )
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
        elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if changes and elsewhere and "origin" not in headers:
            return 403, "this demo accepts requests of its own page only"
        if scope["type"] == "websocket" or not PATHS.fullmatch(self._own_path(scope["path"])):
            return 404, "not found"
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
        # A proxy may terminate TLS, so the scheme is not compared. Either port may be omitted.
        return caller[0] in self._allowed or (caller[0] == host[0] and _same_port(caller[1], host[1], parts.scheme))

    def _own_path(self, path: str) -> str:
        """The path without the root path: some proxies strip it, others do not."""
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
        # Gradio would use these for the addresses in its responses, but any client can send them.
        for name in ("x-forwarded-host", "x-forwarded-prefix", "x-gradio-server"):
            del headers[name]
        path = self._own_path(scope["path"])
        scope["path"] = path
        scope["raw_path"] = path.encode("utf-8")
        scope["root_path"] = prefix
        return scope


def limited(receive: Receive, max_bytes: int) -> Receive:
    """The messages of a request; HTTP 413 if its body is longer than `max_bytes`."""
    taken = 0

    async def counted() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > max_bytes:
            raise HTTPException(413, f"the request is longer than {max_bytes} bytes; send recordings to {UPLOAD}")
        return message

    return counted


def check_root_path(path: str) -> str:
    """A path prefix without its trailing slash; empty for none.

    Raises:
        MossError: it is not an absolute path of plain characters.
    """
    path = path.rstrip("/")
    if path and not PREFIX.fullmatch(path):
        raise MossError(f"--root-path is {path!r}, expected a path such as /demo")
    return path


def check_host_name(name: str) -> str:
    """A host name or address in the normal form for comparisons.

    Raises:
        MossError: it has a scheme, a port or a path, or is not a host name.
    """
    authority = _authority(f"[{name}]" if ":" in name and not name.startswith("[") else name)
    if authority is None or authority[1] is not None:
        raise MossError(f"--allow-host is {name!r}, expected only a host name, such as demo.example.org")
    return authority[0]


def _authority(text: str) -> tuple[str, int | None] | None:
    """(lower-case name, port) of a Host header or the authority of an origin; None if it is malformed."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{1,5}))?", text.strip())
    if match is None:
        return None
    address, name, port = match.groups()
    return (address or name).lower().rstrip("."), int(port) if port else None


def _same_port(caller: int | None, host: int | None, scheme: str) -> bool:
    default = 443 if scheme == "https" else 80
    return (caller or default) == (host or default)


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

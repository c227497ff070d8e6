"""Recordings on their way from a browser to the question that they belong to.

Gradio keeps uploads under a hash of their content, so that pages which send the same file share it, and it limits each
file but not all of them. Here each upload has a folder of its own, is used by one question, and counts towards a total.
"""

import asyncio
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moss_jax.documents import parse_json
from moss_jax.errors import MossError

CALLS = re.compile(r"/gradio_api/(queue/join|call/|run/)")
MEBI = 2**20
FRAMING = 2**16  # bytes of a request beside the files: boundaries and headers
FILES = 4  # in one request
YIELDING = 60.0  # s after which an upload that no question has used makes room for another


@dataclass
class _Upload:
    size: int
    since: float  # clock
    questions: int = 0  # that name it and are not answered yet


@dataclass
class Uploads:
    """The uploads of all pages.

    Args:
        folder: of the uploads alone.
        file_bytes: of one file, at most.
        total_bytes: of all files, those that are arriving included.
        seconds: after which an upload that no question has used is removed.
    """

    folder: Path
    file_bytes: int
    total_bytes: int
    seconds: float
    _held: dict[Path, _Upload] = field(default_factory=dict)
    _arriving: int = 0
    _guard: threading.Lock = field(default_factory=threading.Lock)

    async def receive(self, request: Request) -> Response:
        """Answers a multipart request with the paths of its files, as a JSON list, as Gradio's own route does.

        HTTP 413 for a request that is too long, 507 when there is no room for it: while it is arriving.
        """
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await request.receive()
            size = len(message.get("body", b""))
            if taken + size > self.file_bytes + FRAMING:
                raise HTTPException(413, f"a recording may have {self.file_bytes / MEBI:.0f} MB; send a shorter one")
            if not self._reserve(size):
                raise HTTPException(507, "there is no room for more recordings now; try again in a minute")
            taken += size
            return message

        paths: list[str] = []
        try:
            promised = int(request.headers.get("content-length") or 0)
            if promised > self.file_bytes + FRAMING:
                raise HTTPException(413, f"a recording may have {self.file_bytes / MEBI:.0f} MB; send a shorter one")
            counting = Request(request.scope, counted)
            async with counting.form(max_files=FILES, max_fields=FILES, max_part_size=FRAMING) as form:
                for file in form.getlist("files"):
                    if isinstance(file, UploadFile):
                        paths.append(str(await run_in_threadpool(self._store, file)))
        except HTTPException as error:
            for path in paths:
                self.release(path)
            return PlainTextResponse(f"{error.detail}\n", error.status_code)
        except (ValueError, asyncio.IncompleteReadError):
            return PlainTextResponse("this is no upload\n", 400)
        finally:
            self._release(taken)
        if not paths:
            return PlainTextResponse("this is no upload; send a multipart form with a file called files\n", 400)
        return JSONResponse(paths)

    def holds(self, path: str | Path) -> bool:
        """Whether this is the path of an upload that is there."""
        with self._guard:
            return Path(path) in self._held

    def claim(self, paths: Iterable[str]) -> bool:
        """Keeps uploads for a question that names them; False, and nothing is kept, when one is not there."""
        with self._guard:
            uploads = [self._held.get(Path(path)) for path in paths]
            if None in uploads:
                return False
            for upload in uploads:
                upload.questions += 1
            return True

    def release(self, path: str | Path) -> None:
        """A question is done with an upload; the last one removes it. Nothing happens for any other path."""
        path = Path(path)
        with self._guard:
            upload = self._held.get(path)
            if upload is None:
                return
            upload.questions -= 1
            if upload.questions <= 0:
                self._remove(path)

    def sweep(self) -> None:
        """Removes what no question has used for too long."""
        with self._guard:
            for path in self._older_than(self.seconds):
                self._remove(path)

    def _store(self, file: UploadFile) -> Path:
        # Only a short plain suffix is kept of the client's name; readers may look at it.
        suffix = re.fullmatch(r".*(\.[A-Za-z0-9]{1,8})", file.filename or "", re.DOTALL)
        name = f"recording{suffix[1] if suffix else ''}"
        folder = self.folder / secrets.token_hex(16)
        folder.mkdir(parents=True)
        path = folder / name
        try:
            with path.open("wb") as out:
                shutil.copyfileobj(file.file, out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with self._guard:
            self._held[path] = _Upload(path.stat().st_size, time.monotonic())
        return path

    def _reserve(self, size: int) -> bool:
        with self._guard:
            used = self._arriving + size + sum(upload.size for upload in self._held.values())
            oldest = iter(self._older_than(YIELDING))
            while used > self.total_bytes and (path := next(oldest, None)) is not None:
                used -= self._held[path].size
                self._remove(path)
            if used > self.total_bytes:
                return False
            self._arriving += size
            return True

    def _release(self, size: int) -> None:
        with self._guard:
            self._arriving -= size

    def _remove(self, path: Path) -> None:
        del self._held[path]
        shutil.rmtree(path.parent, ignore_errors=True)

    def _older_than(self, seconds: float) -> list[Path]:
        """The oldest first; under the guard."""
        before = time.monotonic() - seconds
        old = [(upload.since, path) for path, upload in self._held.items() if upload.since <= before]
        return [path for _, path in sorted(old)]


class OnlyUploads:
    """ASGI middleware: a request names no files but uploads, which are kept until its question is answered.

    Gradio would fetch what a request names: from another server, and where it does not serve the page itself, also from
    any folder of this machine.
    """

    def __init__(self, app: ASGIApp, uploads: Uploads):
        self.app = app
        self.uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not CALLS.match(scope["path"]):
            await self.app(scope, receive, send)
            return
        try:
            body = await Request(scope, receive).body()
            paths = set(_file_paths(parse_json(body)))
        except HTTPException as error:
            await PlainTextResponse(f"{error.detail}\n", error.status_code)(scope, receive, send)
            return
        except MossError as error:
            await PlainTextResponse(f"the request: {error}\n", 400)(scope, receive, send)
            return
        if not self.uploads.claim(paths):
            line = "a recording is not here: send it first; it is kept until the questions that name it are answered\n"
            await PlainTextResponse(line, 400)(scope, receive, send)
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]
        status = 500

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        async def observed(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, replay, observed)
        finally:
            if status != 200:  # there will be no question
                for path in paths:
                    self.uploads.release(path)


def _file_paths(value: Any) -> Iterator[str]:
    """The paths of all files that a JSON document names in Gradio's way."""
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str):
            yield path
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _file_paths(item)

"""Uploaded recordings, until the question that they belong to is answered.

Gradio stores uploads under a hash of their content, so that pages that send the same file share it, and it limits the
size of each file but not their total. Here each upload has its own folder, is removed after its question, and counts
towards a total.
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
FRAMING = 2**16  # bytes of a request in addition to the files: boundaries and headers
MAX_FILES = 4  # in one request
EVICTION_SECONDS = 60.0  # an upload that was unused for this long may be removed in favour of a new one


@dataclass
class _Upload:
    size: int
    since: float  # time.monotonic() of its arrival
    questions: int = 0  # number of unanswered questions that use it


@dataclass
class Uploads:
    """The uploads of all pages.

    Args:
        folder: where to store them; contains nothing else.
        file_bytes: maximum size of a file.
        total_bytes: maximum size of all files, including those that are arriving.
        seconds: time after which an unused upload is removed.
    """

    folder: Path
    file_bytes: int
    total_bytes: int
    seconds: float
    _held: dict[Path, _Upload] = field(default_factory=dict)
    _arriving: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    async def receive(self, request: Request) -> Response:
        """Responds to a multipart request with the paths of its files, a JSON list, like the route of Gradio.

        While the request arrives, it is rejected with HTTP 413 if it is too long and with 507 if the total is reached.
        """
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await request.receive()
            size = len(message.get("body", b""))
            if taken + size > self.file_bytes + FRAMING:
                raise HTTPException(
                    413, f"a recording may have at most {self.file_bytes / MEBI:.0f} MB; send a shorter one"
                )
            if not self._reserve(size):
                raise HTTPException(507, "the server has too many recordings at the moment; try again in a minute")
            taken += size
            return message

        paths: list[str] = []
        try:
            promised = int(request.headers.get("content-length") or 0)
            if promised > self.file_bytes + FRAMING:
                raise HTTPException(
                    413, f"a recording may have at most {self.file_bytes / MEBI:.0f} MB; send a shorter one"
                )
            counting = Request(request.scope, counted)
            async with counting.form(max_files=MAX_FILES, max_fields=MAX_FILES, max_part_size=FRAMING) as form:
                for file in form.getlist("files"):
                    if isinstance(file, UploadFile):
                        paths.append(str(await run_in_threadpool(self._store, file)))
        except HTTPException as error:
            for path in paths:
                self.release(path)
            return PlainTextResponse(f"{error.detail}\n", error.status_code)
        except (ValueError, asyncio.IncompleteReadError):
            return PlainTextResponse("not an upload\n", 400)
        finally:
            self._release(taken)
        if not paths:
            return PlainTextResponse("not an upload; send a multipart form with a file in the field files\n", 400)
        return JSONResponse(paths)

    def holds(self, path: str | Path) -> bool:
        """Whether this is the path of a stored upload."""
        with self._lock:
            return Path(path) in self._held

    def claim(self, paths: Iterable[str]) -> bool:
        """Keeps uploads for a question that uses them; False, without any effect, if one does not exist."""
        with self._lock:
            uploads = []
            for path in paths:
                upload = self._held.get(Path(path))
                if upload is None:
                    return False
                uploads.append(upload)
            for upload in uploads:
                upload.questions += 1
            return True

    def release(self, path: str | Path) -> None:
        """Ends the use of an upload by a question; after the last one it is removed. Other paths are ignored."""
        path = Path(path)
        with self._lock:
            upload = self._held.get(path)
            if upload is None:
                return
            upload.questions -= 1
            if upload.questions <= 0:
                self._remove(path)

    def sweep(self) -> None:
        """Removes the uploads that were unused for too long."""
        with self._lock:
            for path in self._older_than(self.seconds):
                self._remove(path)

    def _store(self, file: UploadFile) -> Path:
        # Of the client's file name only a short plain suffix is kept, because decoders may use it.
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
        with self._lock:
            self._held[path] = _Upload(path.stat().st_size, time.monotonic())
        return path

    def _reserve(self, size: int) -> bool:
        with self._lock:
            used = self._arriving + size + sum(upload.size for upload in self._held.values())
            oldest = iter(self._older_than(EVICTION_SECONDS))
            while used > self.total_bytes and (path := next(oldest, None)) is not None:
                used -= self._held[path].size
                self._remove(path)
            if used > self.total_bytes:
                return False
            self._arriving += size
            return True

    def _release(self, size: int) -> None:
        with self._lock:
            self._arriving -= size

    def _remove(self, path: Path) -> None:
        del self._held[path]
        shutil.rmtree(path.parent, ignore_errors=True)

    def _older_than(self, seconds: float) -> list[Path]:
        """Paths of the uploads that are older, the oldest first. The caller holds the lock."""
        before = time.monotonic() - seconds
        old = [(upload.since, path) for path, upload in self._held.items() if upload.since <= before]
        return [path for _, path in sorted(old)]


class OnlyUploads:
    """ASGI middleware: the only files that a request may name are uploads, kept until the question is answered.

    Gradio by itself would fetch any address that a request names, and, depending on how it is mounted, any file of this
    machine.
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
            line = "unknown recording; send it first. It is kept until the questions that use it are answered\n"
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
            if status != 200:  # the question was rejected
                for path in paths:
                    self.uploads.release(path)


def _file_paths(value: Any) -> Iterator[str]:
    """The paths of all files in a JSON document, in the format of Gradio ({"path": ...})."""
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str):
            yield path
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _file_paths(item)

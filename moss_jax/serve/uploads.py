"""Recordings on their way from a browser to the question that they belong to.

Gradio keeps uploads under a hash of their content, so that pages which send the same file share it, and it limits each
file but not all of them. Here each upload has a folder of its own, is used by one question, and counts towards a total.
"""

import asyncio
import secrets
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Message

MEBI = 2**20
FRAMING = 2**16  # bytes of a request beside the files: boundaries and headers
FILES = 4  # in one request
YIELDING = 60.0  # s after which an upload that no question has used makes room for another


@dataclass
class _Upload:
    size: int
    since: float  # clock


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
                self.drop(path)
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

    def drop(self, path: str | Path) -> None:
        """Removes an upload; nothing happens for any other path."""
        path = Path(path)
        with self._guard:
            if self._held.pop(path, None) is not None:
                shutil.rmtree(path.parent, ignore_errors=True)

    def sweep(self) -> None:
        """Removes what no question has used for too long."""
        with self._guard:
            old = self._older_than(self.seconds)
        for path in old:
            self.drop(path)

    def _store(self, file: UploadFile) -> Path:
        suffix = Path(file.filename or "").suffix[:16]
        name = "recording" + "".join(
            letter for letter in suffix if letter.isascii() and (letter.isalnum() or letter == ".")
        )
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
                used -= self._held.pop(path).size
                shutil.rmtree(path.parent, ignore_errors=True)
            if used > self.total_bytes:
                return False
            self._arriving += size
            return True

    def _release(self, size: int) -> None:
        with self._guard:
            self._arriving -= size

    def _older_than(self, seconds: float) -> list[Path]:
        """The oldest first; under the guard."""
        before = time.monotonic() - seconds
        old = [(upload.since, path) for path, upload in self._held.items() if upload.since <= before]
        return [path for _, path in sorted(old)]

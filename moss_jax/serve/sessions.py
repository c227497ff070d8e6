"""The sessions of all pages and programs, limited in number and in age.

The name of a session is chosen by Gradio's client, and programs do not report that they leave. So a session is created
only by a question or a voice recording, and removed when it is empty, left, or unused for too long.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from moss_jax.dialogue.system import System
from moss_jax.errors import MossError
from moss_jax.serve.session import Limits, Session

EVICTION_SECONDS = 120.0  # a session that was unused for this long may be removed in favour of a new one


class Sessions:
    """Sessions by the name that the client chose. All methods are thread-safe.

    Args:
        system: shared by all sessions.
        folder: contains one folder for each session.
    """

    def __init__(self, system: System, folder: Path, limits: Limits):
        self.system = system
        self.folder = folder
        self.limits = limits
        self._sessions: dict[str, Session] = {}
        self._users: dict[str, int] = {}  # number of running requests by the key of the session
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Session]:
        """The session of this name, created if it does not exist; removed afterwards if it is empty.

        Raises:
            MossError: there are too many sessions, and all are in use.
        """
        session = self._enter(name)
        try:
            yield session
        finally:
            self._exit(name, session)

    def get(self, name: str | None) -> Session | None:
        """The session of this name, or None."""
        return self._sessions.get(name) if name else None

    def with_key(self, key: str) -> Session | None:
        """The session with this secret key, or None."""
        with self._lock:
            return next((session for session in self._sessions.values() if session.key == key), None)

    def clear(self, name: str | None) -> None:
        """Deletes the conversation of a session, and the session itself if it has no enrolled voice."""
        session = self.get(name)
        if name is not None and session is not None:
            session.clear()
            self._drop_if_empty(name, session)

    def leave(self, name: str | None) -> None:
        """Removes the session of this name with its files, and ends the answer that it is generating."""
        with self._lock:
            session = self._sessions.pop(name, None) if name else None
        if session is not None:
            session.close()

    def sweep(self) -> None:
        """Removes the sessions that were unused for longer than `Limits.idle_seconds`."""
        with self._lock:
            old = self._unused(self.limits.idle_seconds)
        for name in old:
            self.leave(name)

    def close(self) -> None:
        """Removes all sessions."""
        for name in list(self._sessions):
            self.leave(name)

    def _enter(self, name: str) -> Session:
        evicted = None
        with self._lock:
            session = self._sessions.get(name)
            if session is None:
                if len(self._sessions) >= self.limits.sessions:
                    oldest = next(iter(self._unused(EVICTION_SECONDS)), None)
                    if oldest is None:
                        raise MossError(
                            f"there are {len(self._sessions)} conversations here now, the maximum of this demo; "
                            "try again in a few minutes"
                        )
                    evicted = self._sessions.pop(oldest)
                session = Session(self.system, self.folder / secrets.token_hex(8), self.limits)
                self._sessions[name] = session
            session.used = time.monotonic()
            self._users[session.key] = self._users.get(session.key, 0) + 1
        if evicted is not None:
            evicted.close()
        return session

    def _exit(self, name: str, session: Session) -> None:
        with self._lock:
            session.used = time.monotonic()
            self._users[session.key] -= 1
            if not self._users[session.key]:
                del self._users[session.key]
        self._drop_if_empty(name, session)

    def _drop_if_empty(self, name: str, session: Session) -> None:
        with self._lock:
            empty = not session.entries and session.voice is None and session.key not in self._users
            if not empty or self._sessions.get(name) is not session:
                return
            del self._sessions[name]
        session.close()

    def _unused(self, seconds: float) -> list[str]:
        """Names of the sessions unused for that long, the longest first. The caller holds the lock."""
        before = time.monotonic() - seconds
        unused = [
            (session.used, name)
            for name, session in self._sessions.items()
            if session.used <= before and session.key not in self._users
        ]
        return [name for _, name in sorted(unused)]

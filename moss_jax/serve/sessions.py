"""The sessions of all pages and programs, limited in number and in age.

Gradio's client chooses the name of its session, and a program need not say when it leaves. So names are only keys here:
a session is created by a question or a voice recording, never by a name alone, and removed when it is empty, left or
unused for too long.
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

YIELDING = 120.0  # s after which an unused session makes room for another one


class Sessions:
    """Sessions by the name that the client chose.

    Args:
        system: shared by all sessions.
        folder: each session has a folder of its own in it.
    """

    def __init__(self, system: System, folder: Path, limits: Limits):
        self.system = system
        self.folder = folder
        self.limits = limits
        self._sessions: dict[str, Session] = {}
        self._users: dict[str, int] = {}  # by the session's key: requests that use it now
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Session]:
        """The session of this name, created if there is none; afterwards it is kept if there is anything in it.

        Raises:
            MossError: there are too many sessions, and none is unused.
        """
        session = self._enter(name)
        try:
            yield session
        finally:
            self._exit(name, session)

    def get(self, name: str | None) -> Session | None:
        """The session of this name, if there is one."""
        return self._sessions.get(name) if name else None

    def with_key(self, key: str) -> Session | None:
        """The session that has this secret."""
        with self._guard:
            return next((session for session in self._sessions.values() if session.key == key), None)

    def clear(self, name: str | None) -> None:
        """Forgets a session's conversation, and the session too when it has no voice."""
        session = self.get(name)
        if session is not None:
            session.clear()
            self._drop_if_empty(name, session)

    def leave(self, name: str | None) -> None:
        """Removes the session of this name with its files; an answer that is being generated ends."""
        with self._guard:
            session = self._sessions.pop(name, None) if name else None
        if session is not None:
            session.close()

    def sweep(self) -> None:
        """Removes the sessions that were unused for longer than the limit."""
        with self._guard:
            old = self._unused(self.limits.idle_seconds)
        for name in old:
            self.leave(name)

    def close(self) -> None:
        """Removes all sessions."""
        for name in list(self._sessions):
            self.leave(name)

    def _enter(self, name: str) -> Session:
        evicted = None
        with self._guard:
            session = self._sessions.get(name)
            if session is None:
                if len(self._sessions) >= self.limits.sessions:
                    oldest = next(iter(self._unused(YIELDING)), None)
                    if oldest is None:
                        raise MossError(
                            f"there are {len(self._sessions)} conversations here now, as many as this demo keeps; "
                            "try again in some minutes"
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
        with self._guard:
            session.used = time.monotonic()
            self._users[session.key] -= 1
            if not self._users[session.key]:
                del self._users[session.key]
        self._drop_if_empty(name, session)

    def _drop_if_empty(self, name: str | None, session: Session) -> None:
        with self._guard:
            empty = not session.entries and session.voice is None and session.key not in self._users
            if not empty or self._sessions.get(name) is not session:
                return
            del self._sessions[name]
        session.close()

    def _unused(self, seconds: float) -> list[str]:
        """Names of the sessions unused for that long, the longest first; under the guard."""
        before = time.monotonic() - seconds
        unused = [
            (session.used, name)
            for name, session in self._sessions.items()
            if session.used <= before and session.key not in self._users
        ]
        return [name for _, name in sorted(unused)]

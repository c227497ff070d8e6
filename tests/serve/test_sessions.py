"""How many sessions and uploads the demo keeps, and for how long. Nothing is answered here."""

from types import SimpleNamespace

import pytest

from moss_jax.errors import MossError
from moss_jax.serve.session import Entry, Limits
from moss_jax.serve.sessions import Sessions

pytest.importorskip("gradio")

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from moss_jax.serve.uploads import OnlyUploads, Uploads


def talk(sessions: Sessions, name: str) -> None:
    with sessions.use(name) as session:
        session.entries.append(Entry(None, "user", "Hi"))


def rest(sessions: Sessions, name: str, seconds: float) -> None:
    sessions.get(name).used -= seconds


@pytest.fixture
def sessions(tmp_path):
    return Sessions(None, tmp_path / "sessions", Limits(sessions=3, idle_seconds=1000))


def folders(sessions: Sessions) -> int:
    return len(list(sessions.folder.iterdir())) if sessions.folder.exists() else 0


def test_names_alone_create_nothing(sessions):
    for number in range(300):
        assert sessions.get(f"n{number}") is None
        sessions.clear(f"n{number}")
        sessions.leave(f"n{number}")
        sessions.clear(None)
    assert len(sessions) == folders(sessions) == 0


def test_a_session_in_which_nothing_was_asked_is_not_kept(sessions):
    with sessions.use("a"):
        assert len(sessions) == folders(sessions) == 1
    assert len(sessions) == folders(sessions) == 0
    with pytest.raises(MossError), sessions.use("a"):
        raise MossError("refused")
    assert len(sessions) == folders(sessions) == 0


def test_the_number_of_sessions_is_limited_whatever_names_clients_choose(sessions):
    for name in ("a", "b", "c"):
        talk(sessions, name)
    for number in range(50):
        with pytest.raises(MossError, match="3 conversations here now"), sessions.use(f"n{number}"):
            pass
    assert len(sessions) == folders(sessions) == 3
    talk(sessions, "b")  # those that are there go on


def test_when_it_is_full_the_longest_unused_session_is_evicted(sessions):
    for name in ("a", "b", "c"):
        talk(sessions, name)
    rest(sessions, "a", 200)
    rest(sessions, "b", 300)
    old = sessions.get("b")
    talk(sessions, "d")
    assert sessions.get("b") is None and not old.folder.exists()
    assert sessions.get("a") is not None and len(sessions) == folders(sessions) == 3


def test_a_session_that_is_being_answered_is_not_removed(sessions):
    with sessions.use("a") as session:
        session.entries.append(Entry(None, "user", "Hi"))
        rest(sessions, "a", 5000)
        sessions.sweep()
        assert sessions.get("a") is session
    rest(sessions, "a", 5000)
    sessions.sweep()
    assert len(sessions) == folders(sessions) == 0


def test_only_old_sessions_are_swept(sessions):
    talk(sessions, "a")
    talk(sessions, "b")
    rest(sessions, "a", 1001)
    rest(sessions, "b", 900)
    sessions.sweep()
    assert sessions.get("a") is None and sessions.get("b") is not None


def test_clear_removes_recordings_from_disk(sessions):
    talk(sessions, "a")
    session = sessions.get("a")
    session.voice = object()  # so that the session itself stays
    (session.folder / "1-user.wav").write_bytes(b"sound")
    sessions.clear("a")
    assert sessions.get("a") is session and list(session.folder.iterdir()) == []
    sessions.leave("a")
    assert folders(sessions) == 0


# Uploads


@pytest.fixture
def uploads(tmp_path):
    return Uploads(tmp_path / "uploads", file_bytes=200_000, total_bytes=500_000, seconds=600)


@pytest.fixture
def client(uploads):
    async def ask(request):
        body = await request.json()
        return JSONResponse(body, 503 if body.get("full") else 200)

    routes = [
        Route("/gradio_api/upload", uploads.receive, methods=["POST"]),
        Route("/gradio_api/queue/join", ask, methods=["POST"]),
    ]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(OnlyUploads, uploads=uploads)]))


def send(client, data: bytes = b"sound", name: str = "q.wav"):
    return client.post("/gradio_api/upload", files={"files": (name, data)})


def question(client, path: str, **more):
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, "", "Speak"]
    return client.post("/gradio_api/queue/join", json={"data": data, **more})


def left(uploads: Uploads) -> list:
    return [path for path in uploads.folder.rglob("*") if path.is_file()]


def test_the_same_recording_sent_by_several_pages_is_several_files(client, uploads):
    paths = [send(client).json()[0] for _ in range(4)]
    assert len(set(paths)) == 4
    for path in paths:
        assert question(client, path).status_code == 200
        uploads.release(path)
    assert left(uploads) == [] == list(uploads.folder.iterdir())


def test_an_upload_is_there_for_all_questions_that_name_it(client, uploads):
    path = send(client).json()[0]
    assert [question(client, path).status_code for _ in range(3)] == [200, 200, 200]
    for remaining in (1, 1, 0):
        uploads.release(path)
        assert len(left(uploads)) == remaining
    assert question(client, path).status_code == 400


def test_a_question_that_the_queue_refuses_does_not_keep_an_upload(client, uploads):
    path = send(client).json()[0]
    assert question(client, path, full=True).status_code == 503
    assert left(uploads) == []


@pytest.mark.parametrize("path", ["/etc/passwd", "http://127.0.0.1:1/x.wav", "uploads/x.wav", "", "a\0b"])
def test_a_question_names_no_other_files(client, path):
    answer = question(client, path)
    assert answer.status_code == 400 and "send it first" in answer.text
    hidden = {"data": [{"deep": [{"path": path}]}]}
    assert client.post("/gradio_api/queue/join", json=hidden).status_code == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff"])
def test_invalid_json_is_rejected(client, body):
    assert client.post("/gradio_api/queue/join", content=body).status_code == 400


def test_a_file_that_is_too_long_is_refused_while_it_arrives(client, uploads):
    answer = send(client, bytes(300_000))
    assert answer.status_code == 413 and "MB" in answer.text and left(uploads) == []
    sent = []

    def pieces():
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="q.wav"\r\n\r\n'
        for _ in range(100):
            sent.append(1)
            yield bytes(100_000)

    headers = {"content-type": "multipart/form-data; boundary=x"}  # and no length
    assert client.post("/gradio_api/upload", content=pieces(), headers=headers).status_code == 413
    assert left(uploads) == []


@pytest.fixture
def clock(monkeypatch):
    """The time that uploads see: only `clock.seconds += ...` advances it."""
    clock = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr("moss_jax.serve.uploads.time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


def test_all_uploads_together_are_limited_and_old_ones_are_evicted(client, uploads, clock):
    paths = []
    for seconds in (0, 1, 49):
        clock.seconds += seconds
        paths.append(send(client, bytes(150_000)).json()[0])
    full = send(client, bytes(150_000))
    assert full.status_code == 507 and full.text.count("\n") == 1 and len(left(uploads)) == 3
    clock.seconds += 50
    assert send(client, bytes(150_000)).status_code == 200
    assert {str(path) for path in left(uploads)} >= set(paths[1:]) and paths[0] not in map(str, left(uploads))
    # Nothing counts as arriving any more: when all are removed, a request of exactly the limit is taken, no longer one.
    clock.seconds += 601
    uploads.sweep()
    request = client.build_request("POST", "/gradio_api/upload", files={"files": ("q.wav", bytes(1000))})
    uploads.total_bytes = len(request.read()) - 1
    assert client.send(request).status_code == 507
    uploads.total_bytes += 1
    assert client.send(request).status_code == 200


def test_uploads_that_nobody_asks_with_are_removed(client, uploads, clock):
    send(client)
    uploads.sweep()
    assert len(left(uploads)) == 1
    clock.seconds += 601
    uploads.sweep()
    assert left(uploads) == [] == list(uploads.folder.iterdir())


@pytest.mark.parametrize("name", ["../../x.wav", "/etc/passwd", "a" * 5000 + ".wav", "q.w/av", "ü\n.flac", ".", "q."])
def test_names_of_uploads_lead_nowhere(client, uploads, name):
    answer = send(client, name=name)
    if answer.status_code == 200:
        (path,) = left(uploads)
        assert path.parent.parent == uploads.folder and path.name.startswith("recording")


def test_an_invalid_upload_is_rejected(client):
    assert client.post("/gradio_api/upload", content=b"x").status_code == 400
    assert client.post("/gradio_api/upload", files={"other": ("q.wav", b"x")}).status_code == 400
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post("/gradio_api/upload", content=b"nonsense", headers=headers).status_code == 400

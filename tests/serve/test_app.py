"""The demo as it is served: over HTTP, as a page or a program would ask."""

import json
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile

import moss_jax
from moss_jax.convert.random_system import init_random
from moss_jax.errors import MossError
from moss_jax.serve.session import Limits

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.slow  # one server, one random system

SHORT = {"reply": "text", "max_new_tokens": 4, "api_name": "/ask"}


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    path = tmp_path_factory.mktemp("systems") / "tiny"
    init_random(path, say=lambda line: None)
    return moss_jax.load(path, context=256)


@pytest.fixture(scope="module")
def demo(system):
    from moss_jax.serve.app import Demo

    demo = Demo(system, "tiny", Limits(sessions=6, upload_bytes=500_000))
    demo.address = demo.launch(port=None, block=False)
    yield demo
    demo.close()
    assert not demo.folder.exists()


@pytest.fixture
def client(demo):
    client = gradio_client.Client(demo.address, verbose=False)
    yield client
    demo.sessions.close()
    assert list(demo.uploads.folder.rglob("*")) == []
    assert list(demo.sessions.folder.iterdir()) == []


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "q.wav"
    soundfile.write(path, 0.3 * np.sin(np.arange(16000) / 11), 16000)
    return path


def get(demo, path: str) -> bytes:
    with urllib.request.urlopen(demo.address + path, timeout=600) as answer:
        return answer.read()


def events(address: str, data: dict, name: str = "ask") -> list[tuple[str, object]]:
    """What a program without any client gets: (event, data) of the answer."""
    call = httpx.post(f"{address}gradio_api/call/v2/{name}", json=data, timeout=60)
    assert call.status_code == 200, call.text
    answer = httpx.get(f"{address}gradio_api/call/v2/{name}/{call.json()['event_id']}", timeout=600).text
    return [(kind, json.loads(line)) for kind, line in re.findall(r"event: (\w+)\ndata: (.*)", answer)]


def test_ask_hear_stop_clear_leave(demo, client, recording):
    job = client.submit(
        recording=gradio_client.handle_file(recording),
        system_turn="Speak.",
        max_new_tokens=14,
        min_new_tokens=14,
        api_name="/ask",
    )
    received = []

    def listen():
        while (address := re.search(r"moss/speech/([\w-]+)/[\w-]+", str(job.outputs()))) is None:
            time.sleep(0.01)
        received.append((address[1], get(demo, address[0])))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    talk, live, *_ = job.result(timeout=600)
    listener.join(timeout=600)
    assert live == "" and talk.count("<audio") == talk.count("<img") == 2 and "real-time factor" in talk
    ((key, samples),) = received
    session = demo.sessions.with_key(key)
    assert len(demo.sessions) == 1
    assert len(np.frombuffer(samples, "<i2")) == 14 * 1920
    answer = session.entries[1].audio
    name = f"moss/file/{session.key}/{answer.name}"
    assert name in talk
    assert get(demo, name) == answer.read_bytes()
    kept = soundfile.read(answer, dtype="int16")[0].astype(int)  # rounded by libsndfile
    assert np.abs(np.frombuffer(samples, "<i2") - kept).max() <= 1
    assert not list(demo.uploads.folder.rglob("*.wav"))
    for absent in (f"moss/file/{session.key}/x.wav", f"moss/file/x/{answer.name}", f"moss/speech/{session.key}/x"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(demo, absent)
    client.predict(api_name="/stop")
    client.predict(api_name="/clear")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(demo, name)
    assert session.entries == [] and not session.folder.exists() and len(demo.sessions) == 0


def test_the_same_file_from_several_pages_at_once_is_answered_for_each(demo, client, recording):
    clients = [client, *(gradio_client.Client(demo.address, verbose=False) for _ in range(3))]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(c.predict, recording=gradio_client.handle_file(recording), **SHORT) for c in clients]
        answers = [job.result(timeout=600) for job in jobs]
    assert all(talk.count("moss-user") == talk.count("moss-assistant") == 1 for talk, *_ in answers)
    assert len(demo.sessions) == 4


def test_calls_without_a_question_make_no_sessions(demo, client):
    for number in range(30):
        for name in ("stop", "clear"):
            body = {"data": [], "session_hash": f"h{number}"}
            assert httpx.post(f"{demo.address}gradio_api/run/{name}", json=body).status_code == 200
    with pytest.raises(gradio_client.exceptions.AppError, match="Record a question or choose a file first"):
        client.predict(text=" ", **SHORT)
    assert len(demo.sessions) == 0 and not list(demo.sessions.folder.glob("*"))


def test_sessions_are_limited_whatever_a_program_calls_itself(demo, client):
    for number in range(6):
        assert "complete" in dict(events(demo.address, {"text": "Hi", "reply": "text", "max_new_tokens": 2})), number
    assert len(demo.sessions) == 6
    for _ in range(3):
        (*_, (kind, answer)) = events(demo.address, {"text": "Hi", "reply": "text", "max_new_tokens": 2})
        assert kind == "error" and "6 conversations here now" in answer["error"]
    assert len(demo.sessions) == 6 and len(list(demo.sessions.folder.iterdir())) == 6


def test_a_refusal_is_an_error_and_the_conversation_stays(demo, client, tmp_path):
    talk = client.predict(text="Hi", **SHORT)[0]
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(tmp_path / "short.wav", np.full(1, 0.5), 16000)
    (tmp_path / "text.wav").write_text("no sound")
    refused = {
        "The question has 5000 characters": {"text": "x" * 5000},
        "The system prompt is empty": {"text": "Hi", "system_turn": " "},
        "no speech found": {"recording": gradio_client.handle_file(tmp_path / "silent.wav")},
        "too short to hold speech": {"recording": gradio_client.handle_file(tmp_path / "short.wav")},
        "not an audio file": {"recording": gradio_client.handle_file(tmp_path / "text.wav")},
    }
    for message, question in refused.items():
        with pytest.raises(gradio_client.exceptions.AppError, match=message):
            client.predict(**question, **SHORT)
    kinds = events(demo.address, {"text": "x" * 5000})
    assert kinds[-1][0] == "error" and "5000 characters" in kinds[-1][1]["error"]
    after = client.predict(text="And?", **SHORT)[0]
    assert after.count("moss-user") == 2 and talk.split('<p class="moss-times">')[0] in after


def test_parameters_of_the_api_have_names_and_defaults(demo):
    info = json.loads(get(demo, "gradio_api/info"))["named_endpoints"]
    assert set(info) == {"/ask", "/stop", "/clear"} | ({"/enrol"} if demo.system.can_enrol else set())
    ask = {parameter["parameter_name"]: parameter for parameter in info["/ask"]["parameters"]}
    assert {"recording", "text", "reply", "temperature", "top_p", "top_k", "greedy", "max_new_tokens", "seed"} <= set(
        ask
    )
    assert all(parameter["parameter_has_default"] for parameter in ask.values())


def test_a_direct_call_cannot_pass_the_queue(demo):
    body = {"data": [None, "Hi"], "session_hash": "x"}
    assert httpx.post(f"{demo.address}gradio_api/run/ask", json=body).status_code == 404


def test_an_upload_that_is_too_long_is_refused(demo, client, tmp_path):
    (tmp_path / "long.wav").write_bytes(bytes(600_000))
    with (tmp_path / "long.wav").open("rb") as file:
        answer = httpx.post(f"{demo.address}gradio_api/upload", files={"files": file})
    assert answer.status_code == 413 and "MB" in answer.text
    assert httpx.post(f"{demo.address}gradio_api/queue/join", content=b" " * 2_000_000).status_code == 413


def test_only_this_machine_and_its_own_names_are_served(demo):
    assert demo.address.startswith("http://127.0.0.1")
    own = demo.address.removesuffix("/")
    for headers, status in (
        ({"Origin": own}, 200),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ):
        answer = httpx.get(own + "/config", headers=headers)
        assert answer.status_code == status
        assert not any(name.startswith("access-control") for name in answer.headers)
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(own + "/gradio_api/queue/join", headers=preflight)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert "evil" not in httpx.get(own + "/", headers={"X-Forwarded-Host": "evil.example"}).text
    assert httpx.get(own + "/monitoring/summary").status_code == 404


def test_a_port_that_is_taken_is_an_error(demo, system):
    from moss_jax.serve.app import Demo

    other = Demo(system, "tiny")
    with pytest.raises(MossError, match="choose another --port"):
        other.launch(port=int(demo.address.rsplit(":", 1)[1].strip("/")), block=False)
    other.close()


class Proxy(BaseHTTPRequestHandler):
    """Serves what is below /demo/, as nginx does with `location /demo/ { proxy_pass http://127.0.0.1:PORT/; }`."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if not self.path.startswith("/demo/"):
            self.send_error(404)
            return
        length = int(self.headers.get("Content-Length") or 0)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in self.server.dropped}
        url = self.server.behind + self.path.removeprefix("/demo")
        answer = httpx.request(self.command, url, headers=headers, content=self.rfile.read(length), timeout=600)
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers.get("content-type", ""))
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_POST = do_GET

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("keeps_host", [True, False])
def test_behind_a_proxy_everything_stays_below_its_path(system, recording, keeps_host):
    from moss_jax.serve.app import Demo

    demo = Demo(system, "tiny")
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        proxy.asked = []
        proxy.dropped = set() if keeps_host else {"host"}
        proxy.behind = demo.launch(port=None, block=False, root_path="/demo").removesuffix("/")
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.server_port}/demo/"
        try:
            page = httpx.get(address).text
            (root,) = re.findall(r'"root":"(http[^"]*)"', page)
            assert root.endswith("/demo")
            addresses = re.findall(r'(?:src|href)="([^"]+)"', page)
            assert addresses and not any(a.startswith("/") and not a.startswith("/demo/") for a in addresses)
            if keeps_host:
                client = gradio_client.Client(address, verbose=False)
                talk = client.predict(recording=gradio_client.handle_file(recording), **SHORT)[0]
                (sound,) = re.findall(r'<audio[^>]* src="([^"]+)"', talk)
                assert not sound.startswith("/") and httpx.get(address + sound).status_code == 200
            assert proxy.asked and all(path.startswith("/demo/") for path in proxy.asked)
        finally:
            proxy.shutdown()
            demo.close()

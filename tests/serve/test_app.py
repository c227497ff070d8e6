"""The demo as it is served: over HTTP, as a page would ask."""

import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import soundfile

import moss_jax
from moss_jax.convert.random_system import init_random

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")
SAMPLING = (0.6, 0.95, 20, 1.1, False, 14, 14, 0)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    from moss_jax.serve.app import Demo

    path = tmp_path_factory.mktemp("systems") / "tiny"
    init_random(path, say=lambda line: None)
    demo = Demo(moss_jax.load(path, context=256), "tiny")
    demo.address = demo.launch(port=None, block=False)
    yield demo
    demo.close()
    assert not demo.folder.exists()


def get(demo, path: str) -> bytes:
    with urllib.request.urlopen(demo.address + path, timeout=600) as answer:
        return answer.read()


@pytest.mark.long
@pytest.mark.slow
def test_ask_hear_stop_clear_leave(demo, tmp_path):
    client = gradio_client.Client(demo.address, verbose=False)
    soundfile.write(tmp_path / "q.wav", 0.3 * np.sin(np.arange(16000) / 11), 16000)
    question = gradio_client.handle_file(tmp_path / "q.wav")
    job = client.submit(question, "", "Speak", "speech", "no voice in particular", "Speak.", *SAMPLING, api_name="/ask")
    heard = []

    def listen():
        while not demo._feeds:
            time.sleep(0.01)
        ((session, feed),) = demo._feeds.items()
        heard.append(get(demo, f"moss/speech/{session}/{feed.key}"))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    talk, live, *_ = job.result(timeout=600)
    listener.join(timeout=600)
    assert live == "" and talk.count("<audio") == talk.count("<img") == 2 and "real-time factor" in talk
    (session,) = demo.sessions.values()
    assert len(np.frombuffer(heard[0], "<i2")) == 14 * 1920
    answer = session.entries[1].audio
    name = f"moss/file/{session.key}/{answer.name}"
    assert name in talk
    assert get(demo, name) == answer.read_bytes()
    kept = soundfile.read(answer, dtype="int16")[0].astype(int)  # rounded by libsndfile
    assert np.abs(np.frombuffer(heard[0], "<i2") - kept).max() <= 1
    assert not list((demo.folder / "uploads").rglob("*.wav"))
    for absent in (f"moss/file/{session.key}/x.wav", f"moss/file/x/{answer.name}", f"moss/speech/{session.key}/x"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(demo, absent)
    client.predict(api_name="/stop")
    client.predict(api_name="/clear")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(demo, name)
    assert session.entries == []


def test_only_this_machine_is_served_by_default(demo):
    assert demo.blocks.server_name == "127.0.0.1" and demo.address.startswith("http://127.0.0.1")

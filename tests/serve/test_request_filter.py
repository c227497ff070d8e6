"""Which requests the demo answers: by host, origin, path and size. Without a server and without a model."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moss_jax.errors import MossError

pytest.importorskip("gradio")

from moss_jax.serve.request_filter import RequestFilter, check_host_name, check_root_path


def ask(
    request_filter: RequestFilter, method: str = "GET", path: str = "/", **headers: str | list[str]
) -> tuple[int, str, dict]:
    """Status, body and, where the request is let through, the scope that the page sees."""
    pairs = []
    for name, values in headers.items():
        for value in values if isinstance(values, list) else [values]:
            pairs.append((name.replace("_", "-").encode(), value.encode("latin-1")))
    scope = {"type": "http", "method": method, "path": path, "headers": pairs, "query_string": b"", "root_path": ""}
    sent = []
    seen: dict = {}

    async def app(scope, receive, send):
        seen.update(scope)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    request_filter.app = app
    asyncio.run(request_filter(scope, receive, send))
    if seen:
        return 200, "", seen
    return sent[0]["status"], sent[1]["body"].decode(), {}


@pytest.fixture
def request_filter():
    return RequestFilter(None, "127.0.0.1")


@pytest.mark.parametrize(
    "host", ["127.0.0.1:7860", "localhost:7860", "LOCALHOST", "[::1]:7860", "127.9.9.9:1", "localhost."]
)
def test_a_loopback_server_answers_under_loopback_names(request_filter, host):
    assert ask(request_filter, host=host)[0] == 200
    assert ask(request_filter, "POST", "/gradio_api/queue/join", host=host, origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:7860",
        "127.0.0.1.evil.example:7860",
        "localhost.evil.example",
        "192.168.1.7:7860",
        "0.0.0.0:7860",
        "evil@127.0.0.1",
        "127.0.0.1:7860/x",
        "",
        "[::1",
        "127.0.0.1, evil.example",
    ],
)
def test_a_loopback_server_answers_under_no_other_name(request_filter, host):
    status, line, _ = ask(request_filter, host=host, origin=f"http://{host}")
    assert status == 421 and line.count("\n") == 1 and "--allow-host" in line


def test_a_request_has_one_host(request_filter):
    assert ask(request_filter)[0] == 421
    assert ask(request_filter, host=["127.0.0.1", "evil.example"])[0] == 421


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://127.0.0.1:3000",
        "https://localhost:7860",
        "http://localhost",
        "x",
        "file://",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_pages_of_other_origins_are_not_answered(request_filter, method, origin):
    status, line, _ = ask(request_filter, method, "/gradio_api/queue/join", host="127.0.0.1:7860", origin=origin)
    assert status == 403 and line.count("\n") == 1


def test_a_post_from_another_site_without_an_origin_is_refused(request_filter):
    headers = {"host": "127.0.0.1:7860", "sec_fetch_site": "cross-site"}
    assert ask(request_filter, "POST", "/gradio_api/queue/join", **headers)[0] == 403
    assert ask(request_filter, "GET", "/", **headers)[0] == 200  # a link to the demo


def test_allowed_names_work_whether_or_not_a_proxy_keeps_the_host():
    request_filter = RequestFilter(None, "127.0.0.1", ["Demo.Example.org"])
    join = ("POST", "/gradio_api/queue/join")
    assert ask(request_filter, *join, host="demo.example.org", origin="https://demo.example.org")[0] == 200
    assert ask(request_filter, *join, host="127.0.0.1:7860", origin="https://demo.example.org")[0] == 200
    assert ask(request_filter, *join, host="demo.example.org", origin="https://evil.example")[0] == 403
    assert ask(request_filter, *join, host="evil.example", origin="https://demo.example.org")[0] == 421


def test_a_server_for_the_network_answers_under_addresses_and_its_own_name_only(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "gpu1")
    monkeypatch.setattr("socket.getfqdn", lambda: "gpu1.lab.example")
    request_filter = RequestFilter(None, "0.0.0.0", ["demo.example.org"])
    for host in (
        "192.168.1.7:7860",
        "[2001:db8::1]:7860",
        "localhost:7860",
        "gpu1:7860",
        "gpu1.lab.example",
        "demo.example.org",
    ):
        assert ask(request_filter, host=host, origin=f"http://{host}")[0] == 200
        assert ask(request_filter, "POST", "/gradio_api/queue/join", host=host, origin="http://evil.example")[0] == 403
    assert ask(request_filter, host="evil.example", origin="http://evil.example")[0] == 421


@pytest.mark.parametrize(
    "path",
    [
        "/monitoring",
        "/monitoring/summary",
        "/gradio_api/openapi.json",
        "/gradio_api/runs",
        "/gradio_api/proxy=http://evil.example",
        "/gradio_api/component_server",
        "/gradio_api/vibe-edit",
        "/gradio_api/deep_link",
        "/docs",
        "/moss",
        "/config/../monitoring",
    ],
)
def test_what_the_page_does_not_need_is_closed(request_filter, path):
    assert ask(request_filter, host="127.0.0.1", path=path)[0] == 404


def test_a_websocket_is_closed(request_filter):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/gradio_api/queue/join", "headers": [(b"host", b"127.0.0.1")]}
    asyncio.run(request_filter(scope, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_forwarding_headers_are_not_believed(request_filter):
    headers = {"x_forwarded_host": "evil.example", "x_gradio_server": "http://evil.example"}
    seen = ask(request_filter, host="127.0.0.1:7860", **headers)[2]
    assert seen["headers"] == [(b"host", b"127.0.0.1:7860")]


@pytest.mark.parametrize("path", ["/config", "/demo/config"])
def test_a_root_path_may_be_stripped_by_the_proxy_or_not(path):
    seen = ask(RequestFilter(None, "127.0.0.1", root_path="/demo/"), host="localhost", path=path)[2]
    assert (seen["path"], seen["root_path"]) == ("/config", "/demo")


def test_a_forwarded_prefix_is_used_where_it_is_a_path_and_none_was_given(request_filter):
    assert ask(request_filter, host="localhost", x_forwarded_prefix="/a/b/")[2]["root_path"] == "/a/b"
    for wrong in ("//evil.example", "http://evil.example", "/a b", '/"><script>', "x", "/../x?y"):
        assert ask(request_filter, host="localhost", x_forwarded_prefix=wrong)[2]["root_path"] == ""
    given = RequestFilter(None, "127.0.0.1", root_path="/demo")
    assert ask(given, host="localhost", x_forwarded_prefix="/other")[2]["root_path"] == "/demo"


@pytest.mark.parametrize("name", ["http://demo.example", "demo.example:80", "demo.example/x", "", "a b", "*"])
def test_a_host_name_is_a_name_alone(name):
    with pytest.raises(MossError, match="--allow-host"):
        check_host_name(name)


@pytest.mark.parametrize("path", ["demo", "//demo", "/a?b", "/a b", "https://demo.example"])
def test_a_root_path_is_a_path(path):
    with pytest.raises(MossError, match="--root-path"):
        check_root_path(path)


@given(st.text(st.characters(max_codepoint=255), max_size=40))
def test_no_host_header_is_a_traceback_and_strange_ones_are_refused(text):
    status = ask(RequestFilter(None, "127.0.0.1"), host=text)[0]
    assert status == 421 or text.strip().lower().startswith(("localhost", "127.", "[", "::"))


@given(st.text(st.characters(max_codepoint=255), max_size=40))
def test_no_origin_header_is_a_traceback(text):
    assert ask(RequestFilter(None, "127.0.0.1"), host="localhost:1", origin=text)[0] == 403

"""The page: its layout and events, and the server. The logic is in `session`."""

import asyncio
import os
import shutil
import socket
import tempfile
import threading
import traceback
from collections.abc import Generator, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moss_jax.dialogue.reply import Piece
from moss_jax.dialogue.system import System
from moss_jax.errors import MossError
from moss_jax.serve import cards
from moss_jax.serve.feed import SpeechFeed
from moss_jax.serve.session import OWN_VOICE, Limits, Session
from moss_jax.serve.sessions import Sessions
from moss_jax.text.chat_template import DEFAULT_SYSTEM_PROMPT

try:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.datastructures import MutableHeaders
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import BaseRoute, Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from moss_jax.serve.request_filter import RequestFilter, check_host_name, check_root_path
    from moss_jax.serve.uploads import OnlyUploads, Uploads
except ImportError as error:
    raise MossError("the demo needs Gradio: pip install 'moss-jax[serve]'") from error

PAGE = Path(__file__).parent / "page"
QUEUE_SIZE = 20  # questions that may wait
SWEEP_INTERVAL = 10.0  # s between two removals of expired sessions and uploads
SPEAK = "Speak"
WRITE = "Write"
REPLIES = (("Aloud", "speech"), ("In writing", "text"))
DEFAULT_VOICE = "no particular voice"
ONLY_VOICE = "the voice of the training data"
REJECTED = "Not possible"


class RelativeManifest:
    """ASGI middleware that makes the page's link to its manifest relative; Gradio writes an absolute path."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/":
            await self.app(scope, receive, send)
            return
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]}
        start: Message = {}
        body = b""

        async def collect(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                page = body.replace(b'href="/manifest.json"', b'href="./manifest.json"')
                if body:  # the response to HEAD has none, and keeps its length
                    MutableHeaders(scope=start)["content-length"] = str(len(page))
                await send(start)
                await send({"type": "http.response.body", "body": page})

        await self.app(scope, receive, collect)


class Demo:
    """The server of the demo: one system, and one session for each page.

    Args:
        system: answers all questions.
        name: of the system, as shown on the page.
        limits: of uploads, questions and sessions.
    """

    def __init__(self, system: System, name: str, limits: Limits | None = None):
        self.system = system
        self.name = name
        self.limits = limits or Limits()
        self.folder = Path(tempfile.mkdtemp(prefix="moss-jax-demo-"))  # contains all files of the demo
        self.sessions = Sessions(system, self.folder / "sessions", self.limits)
        self.uploads = Uploads(
            self.folder / "uploads",
            self.limits.upload_bytes,
            self.limits.uploads_bytes,
            self.limits.upload_seconds,
        )
        self.sessions.folder.mkdir()
        self.uploads.folder.mkdir()
        self.blocks: gr.Blocks | None = None
        self._application: FastAPI | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = threading.Event()

    def launch(
        self,
        host: str = "127.0.0.1",
        port: int | None = None,
        block: bool = True,
        allow_hosts: Sequence[str] = (),
        root_path: str = "",
    ) -> str:
        """Serves the page and returns its address.

        Args:
            host: the address to listen on.
            port: None for any free one.
            block: return only when the server has ended.
            allow_hosts: further accepted host names, see `RequestFilter`.
            root_path: the prefix under which a proxy serves the demo, such as /demo.

        Raises:
            MossError: the port is in use, or `allow_hosts` or `root_path` is malformed.
        """
        root_path = check_root_path(root_path)
        for name in allow_hosts:
            check_host_name(name)  # the middleware is created in the server thread, too late for an error
        request_filter = Middleware(RequestFilter, host=host, allowed=allow_hosts, root_path=root_path)
        os.environ["GRADIO_TEMP_DIR"] = str(self.uploads.folder)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port or 0), family=family)
        except OSError as error:
            raise MossError(f"{host}:{port}: cannot listen there ({error}); choose another --port") from error
        port = listener.getsockname()[1]
        self._application = self._routed(request_filter, root_path)
        config = uvicorn.Config(
            self._application,
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, args=(listener,), daemon=True)
        self._thread.start()
        threading.Thread(target=self._sweep, daemon=True).start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise MossError(f"{host}:{port}: the server could not start; see the error above")
            self._thread.join(0.01)
        if block:
            self.wait()
        shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{shown}:{port}/"

    def wait(self) -> None:
        """Returns when the server has ended."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.5)

    def close(self) -> None:
        """Ends all answers, stops the server, and removes all files."""
        self._closed.set()
        self.sessions.close()
        if self.blocks is not None:
            self.blocks.close(verbose=False)
        if self._server is not None:
            assert self._loop is not None and self._application is not None  # set by `launch`
            gradio_app: Any = self._application.routes[-1].app  # type: ignore[attr-defined]  # the route is a Mount
            # Ends the heartbeats of open pages, for which the server would wait.
            self._loop.call_soon_threadsafe(gradio_app.stop_event.set)
            self._server.should_exit = True
            self.wait()
        self.sessions.close()  # sessions of requests that arrived meanwhile
        shutil.rmtree(self.folder, ignore_errors=True)

    def _serve(self, listener: socket.socket) -> None:
        async def serve() -> None:
            assert self._server is not None  # set by `launch`
            self._loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[listener])

        asyncio.run(serve())

    def _sweep(self) -> None:
        while not self._closed.wait(SWEEP_INTERVAL):
            self.sessions.sweep()
            self.uploads.sweep()

    def _routed(self, request_filter: Middleware, root_path: str) -> FastAPI:
        self.blocks = self._layout()
        self.blocks.queue(max_size=QUEUE_SIZE, api_open=False)
        self.blocks.state_session_capacity = 4 * self.limits.sessions
        routes: list[BaseRoute] = [
            Route("/moss/speech/{session}/{key}", self._speech),
            Route("/moss/file/{session}/{name}", self._file),
            # These replace the routes of Gradio.
            Route("/gradio_api/upload", self.uploads.receive, methods=["POST"]),
            Route("/gradio_api/upload_progress", self._progress),
            Route("/gradio_api/file={path:path}", self._uploaded),
        ]
        # By default Gradio allows pages of any origin to read responses; this CORS policy allows none.
        middleware = [
            request_filter,
            Middleware(CORSMiddleware),
            Middleware(OnlyUploads, uploads=self.uploads),
            Middleware(RelativeManifest),
        ]
        application = FastAPI(routes=routes, middleware=middleware, openapi_url=None)
        fonts = ("ui-sans-serif", "system-ui", "sans-serif")  # installed fonts: nothing is downloaded
        script = (PAGE / "player.js").read_text(encoding="utf-8")
        gr.mount_gradio_app(
            application,
            self.blocks,
            path="/",
            root_path=root_path or None,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            max_file_size=self.limits.upload_bytes,
            theme=gr.themes.Default(primary_hue="teal", font=fonts, font_mono=("ui-monospace", "monospace")),
            css_paths=PAGE / "style.css",
            head=f"<script>{script}</script>",
        )
        return application

    # Events of the page, and endpoints of the API.

    def _ask(
        self,
        request: gr.Request,
        recording: str | None = None,
        text: str | None = None,
        you: str = SPEAK,
        reply: str = "speech",
        voice: str | None = None,
        system_turn: str | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        greedy: bool | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        seed: int = 0,
    ) -> Iterator[dict]:
        """Answers a recorded or written question.

        Continues the conversation of this client. A question that is rejected is an error.
        """
        given = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repetition_penalty": repetition_penalty,
            "greedy": greedy,
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
        }
        sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        parts = self._parts
        session = None
        try:
            use_recording = _uses_recording(recording, text, you)
            with self.sessions.use(_session_name(request)) as session:
                pieces = session.ask(
                    text=None if use_recording else text,
                    recording=recording if use_recording else None,
                    reply=reply,
                    system_turn=DEFAULT_SYSTEM_PROMPT[reply] if system_turn is None else system_turn,
                    voice=None if voice in (DEFAULT_VOICE, ONLY_VOICE) else voice,
                    seed=seed,
                    **sampling,
                )
                yield from self._answer(session, pieces, reply)
            return
        except MossError as error:
            rejected = _sentence(error)
        except Exception:
            traceback.print_exc()
            rejected = "Internal error. See the terminal of the server."
        finally:
            if recording is not None:
                self.uploads.release(recording)
        # First the page gets the unchanged conversation, then page and program get the error.
        talk = self._talk(session) if session is not None else gr.skip()
        yield {parts["talk"]: talk, parts["live"]: "", parts["recording"]: None, **self._busy(False)}
        raise _error(rejected, REJECTED)

    def _answer(self, session: Session, pieces: Generator[Piece], reply: str) -> Iterator[dict]:
        """Updates of the page while the answer is generated, and afterwards."""
        parts = self._parts
        feed = SpeechFeed(self.system.speech_decoder.config.sample_rate) if reply == "speech" else None
        address = f"moss/speech/{session.key}/{feed.key}" if feed else ""
        if feed:
            session.feed = feed
        try:
            yield {
                parts["talk"]: self._talk(session),
                parts["live"]: cards.answering(reply, feed=address),
                parts["recording"]: None,
                parts["text"]: "",
                **self._busy(True),
            }
            text = ""
            speaking = False
            for piece in pieces:
                text += piece.text
                starts = piece.wave.size > 0 and not speaking
                if feed:
                    feed.push(piece.wave)
                if piece.text or starts:  # otherwise the card does not change
                    speaking |= starts
                    yield {parts["live"]: cards.answering(reply, text, speaking, address)}
        finally:
            pieces.close()  # if the client has left: removes the unanswered question
            if feed:
                feed.finish()
        yield {parts["talk"]: self._talk(session), parts["live"]: "", **self._busy(False)}

    def _talk(self, session: Session) -> str:
        return cards.conversation(session.entries, f"moss/file/{session.key}")

    def _busy(self, busy: bool) -> dict:
        return {self._parts["ask"]: gr.Button(interactive=not busy)}

    def _stop(self, request: gr.Request) -> None:
        """Ends the answer that is being generated; what was generated stays in the conversation."""
        session = self.sessions.get(request.session_hash)
        if session is not None:
            session.stop()

    def _clear(self, request: gr.Request) -> tuple[str, str, None, str]:
        """Deletes the conversation and its recordings."""
        self.sessions.clear(request.session_hash)
        return cards.EMPTY, "", None, ""

    def _enrol(self, request: gr.Request, recording: str | None = None) -> Iterator[tuple[None, Any, str]]:
        """Enrols the voice "my recording" from a recording."""
        if recording is None:  # the event of the page clearing its field
            yield None, gr.skip(), ""
            return
        try:
            with self.sessions.use(_session_name(request)) as session:
                seconds = session.enrol(recording)
            voice = gr.Dropdown([*self._voices(), OWN_VOICE], value=OWN_VOICE)
            yield None, voice, f"Answers now sound like your recording of {seconds:.1f} s."
            return
        except MossError as error:
            rejected = _sentence(error)
        finally:
            self.uploads.release(recording)
        yield None, gr.skip(), ""
        raise _error(rejected, "Voice not enrolled")

    def _leave(self, request: gr.Request) -> None:
        self.sessions.leave(request.session_hash)

    # Addresses that the browser fetches. The keys are secrets, so that a page has access to its own files only.

    def _speech(self, request: Request) -> Response:
        session = self.sessions.with_key(request.path_params["session"])
        feed = session.feed if session is not None else None
        if session is None or feed is None or feed.key != request.path_params["key"]:
            return PlainTextResponse("no such answer, or it was fetched already", 404)
        session.feed = None
        headers = {"X-Sample-Rate": str(feed.sample_rate), "Cache-Control": "no-store"}
        return StreamingResponse(iter(feed), media_type="application/octet-stream", headers=headers)

    def _file(self, request: Request) -> Response:
        session = self.sessions.with_key(request.path_params["session"])
        path = session.file(request.path_params["name"]) if session is not None else None
        if path is None or not path.is_file():
            return PlainTextResponse("no such file, or its conversation was deleted", 404)
        return FileResponse(path, headers={"Cache-Control": "no-store"})

    def _uploaded(self, request: Request) -> Response:
        path = Path(request.path_params["path"])
        if not (self.uploads.holds(path) and path.is_file()):
            return PlainTextResponse("no such recording", 404)
        headers = {"Cache-Control": "no-store", "Content-Disposition": "attachment"}
        return FileResponse(path, media_type="application/octet-stream", headers=headers)

    def _progress(self, request: Request) -> Response:
        return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    # Layout.

    def _layout(self) -> gr.Blocks:
        with gr.Blocks(title="MOSS-Speech", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            gr.HTML(
                "<h1>MOSS-Speech</h1><p>Ask a spoken or written question. Answers play while they are generated. "
                f"Model: <b>{escape(self.name)}</b></p>",
                elem_id="moss-head",
            )
            with gr.Row():
                with gr.Column(scale=5, min_width=380):
                    with gr.Column(elem_id="moss-talk"):
                        talk = gr.HTML(cards.EMPTY)
                        live = gr.HTML("")
                    with gr.Row():
                        you = gr.Radio([SPEAK, WRITE], value=SPEAK, label="You ask", elem_id="moss-you")
                        reply = gr.Radio(list(REPLIES), value="speech", label="It answers", elem_id="moss-reply")
                    recording = gr.Audio(
                        sources=["microphone", "upload"],
                        type="filepath",
                        label="Your question",
                        elem_id="moss-mic",
                        buttons=[],
                    )
                    text = gr.Textbox(
                        label="Your question",
                        placeholder="Type it here and press Enter",
                        visible=False,
                        max_lines=5,
                        max_length=self.limits.question_characters,
                        elem_id="moss-text",
                        submit_btn=False,
                    )
                    with gr.Row():
                        ask = gr.Button("Ask", variant="primary", scale=3, visible=False, elem_id="moss-ask")
                        stop = gr.Button("Stop the answer", scale=2, elem_id="moss-stop")
                        clear = gr.Button("Clear", scale=1, elem_id="moss-clear")
                with gr.Column(scale=2, min_width=260):
                    voice, own_recording, enrolled = self._voice_panel()
                    with gr.Accordion("System prompt", open=False):
                        system_turn = gr.Textbox(
                            DEFAULT_SYSTEM_PROMPT["speech"],
                            label="Instructions for the assistant",
                            lines=4,
                            max_length=2000,
                            elem_id="moss-system",
                        )
                    sampling = _sampling_panel(self.system.sampling)
            self._parts = {"talk": talk, "live": live, "recording": recording, "text": text, "ask": ask}
            asking = {
                "fn": self._ask,
                "inputs": [recording, text, you, reply, voice, system_turn, *sampling.values()],
                "outputs": [talk, live, recording, text, ask],
                "concurrency_limit": 1,
                "concurrency_id": "model",
                "trigger_mode": "multiple",
                "show_progress": "hidden",
            }
            # A question is asked as soon as the recording ends or the file is uploaded.
            gr.on([ask.click, text.submit, recording.stop_recording, recording.upload], **asking, api_name="ask")
            # Starting to record interrupts the answer.
            gr.on([stop.click, recording.start_recording], self._stop, queue=False, api_name="stop")
            clear.click(self._clear, outputs=[talk, live, recording, text], queue=False, api_name="clear")
            you.change(
                _inputs_shown,
                you,
                [recording, text, ask],
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )
            reply.change(
                _system_turn,
                [reply, system_turn],
                system_turn,
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )
            if own_recording is not None:
                gr.on(
                    [own_recording.upload, own_recording.stop_recording],
                    self._enrol,
                    own_recording,
                    [own_recording, voice, enrolled],
                    concurrency_limit=1,
                    concurrency_id="model",
                    api_name="enrol",
                )
            blocks.unload(self._leave)
        return blocks

    def _voices(self) -> list[str]:
        """Choices of the voice list; DEFAULT_VOICE is the zero voice, for systems without a default voice."""
        names = self.system.folder.voices()
        if not names and self.system.speech_decoder.config.speaker is None:
            return [ONLY_VOICE]
        return names if self.system.folder.settings.get("default_voice") in names else [DEFAULT_VOICE, *names]

    def _voice_panel(self) -> tuple[gr.Dropdown, gr.Audio | None, gr.Markdown | None]:
        """Voice list, recording to enrol, and its status; the last two are None if the system cannot enrol voices."""
        choices = self._voices()
        default = self.system.folder.settings.get("default_voice")
        first = default if default in choices else choices[0]
        voice = gr.Dropdown(choices, value=first, label="Voice", elem_id="moss-voice", interactive=True)
        if not self.system.can_enrol:
            return voice, None, None
        enrolled = gr.Markdown("", elem_id="moss-voice-enrolled")
        with gr.Accordion("Enrol a voice", open=False):
            gr.Markdown(
                f"Several seconds of clear speech by one consenting person, at most {self.limits.voice_seconds:.0f} s."
            )
            own_recording = gr.Audio(
                sources=["upload", "microphone"],
                type="filepath",
                show_label=False,
                elem_id="moss-own-voice",
                buttons=[],
            )
        return voice, own_recording, enrolled


def _sampling_panel(defaults: dict[str, Any]) -> dict[str, gr.components.Component]:
    """Controls by keyword of `Session.ask`; they start at the defaults of the system."""
    with gr.Accordion("Sampling", open=False):
        return {
            "temperature": gr.Slider(
                0.1, 2, defaults["temperature"], step=0.05, label="Temperature", info="higher is more varied"
            ),
            "top_p": gr.Slider(0.05, 1, defaults["top_p"], step=0.05, label="Top-p", info="1: off"),
            "top_k": gr.Slider(0, 100, defaults["top_k"], step=1, label="Top-k", info="0: off; a new value compiles"),
            "repetition_penalty": gr.Slider(
                1, 2, defaults["repetition_penalty"], step=0.05, label="Repetition penalty", info="1: off"
            ),
            "greedy": gr.Checkbox(defaults["greedy"], label="Greedy", info="most likely token, no sampling"),
            "max_new_tokens": gr.Slider(
                1,
                2000,
                defaults["max_new_tokens"],
                step=1,
                label="Maximum length",
                info="rows; 12.5 per second of speech",
            ),
            "min_new_tokens": gr.Slider(
                0, 100, defaults["min_new_tokens"], step=1, label="Minimum length", info="rows, spoken answers"
            ),
            "seed": gr.Number(0, precision=0, minimum=0, label="Seed", info="the same seed gives the same answer"),
        }


def _inputs_shown(you: str) -> tuple[Any, Any, Any]:
    return gr.Audio(visible=you == SPEAK), gr.Textbox(visible=you == WRITE), gr.Button(visible=you == WRITE)


def _system_turn(reply: str, shown: str) -> Any:
    """The default system prompt for the kind of answer, unless the user has changed it."""
    return DEFAULT_SYSTEM_PROMPT[reply] if shown in DEFAULT_SYSTEM_PROMPT.values() else gr.skip()


def _session_name(request: gr.Request) -> str:
    """The name that Gradio's client chose; both the page and gradio_client always send one."""
    return request.session_hash or ""


def _uses_recording(recording: str | None, text: str | None, you: str) -> bool:
    """Whether the question is the recording and not the text: the kind selected on the page, if both are given.

    Raises:
        MossError: neither is given.
    """
    written = text is not None and bool(text.strip())
    if recording is None and not written:
        action = "record a question or choose a file" if you == SPEAK else "write a question"
        raise MossError(f"{action} first")
    return recording is not None and (you == SPEAK or not written)


def _error(sentence: str, title: str) -> gr.Error:
    # The page shows the message as HTML. Quotes are not escaped, so that programs get them unchanged.
    return gr.Error(escape(sentence, quote=False), title=title, print_exception=False)


def _sentence(error: MossError) -> str:
    line = str(error).splitlines()[0]
    return line[:1].upper() + line[1:] + "."

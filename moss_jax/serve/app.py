"""The page: its layout, and which event calls what. What happens then is in `session`."""

import asyncio
import os
import shutil
import socket
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

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
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from moss_jax.serve.door import Door, check_root_path
    from moss_jax.serve.uploads import OnlyUploads, Uploads
except ImportError as error:
    raise MossError("the demo needs Gradio: pip install 'moss-jax[serve]'") from error

PAGE = Path(__file__).parent / "page"
WAITING = 20  # questions in the queue
SWEEP = 10.0  # s between two looks for what is too old
SPEAK = "Speak"
WRITE = "Write"
REPLIES = (("Aloud", "speech"), ("In writing", "text"))
DEFAULT_VOICE = "no voice in particular"
ONE_VOICE = "the one it was trained with"
REFUSED = "That did not work"


class RelativeManifest:
    """ASGI middleware: the page's link to its manifest, which Gradio writes from the top of the host, is relative."""

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
                if body:  # a HEAD has none, and its length stays
                    MutableHeaders(scope=start)["content-length"] = str(len(page))
                await send(start)
                await send({"type": "http.response.body", "body": page})

        await self.app(scope, receive, collect)


class Demo:
    """One system for everybody who opens the page, one session for each.

    Args:
        name: of the system, as the page shows it.
        limits: what one person may send, and what is kept of all.
    """

    def __init__(self, system: System, name: str, limits: Limits | None = None):
        self.system = system
        self.name = name
        self.limits = limits or Limits()
        self.folder = Path(tempfile.mkdtemp(prefix="moss-jax-demo-"))  # everything that is kept on disk
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
        """Serves the page and returns its address; with `block` only when Ctrl-C ends it.

        Args:
            port: None for any free one.
            allow_hosts: further names that the demo is served under, see `Door`.
            root_path: the path that a proxy puts before the demo's own, such as /demo.

        Raises:
            MossError: the port is taken, or `allow_hosts` or `root_path` is malformed.
        """
        root_path = check_root_path(root_path)
        door = Middleware(Door, host=host, allowed=allow_hosts, root_path=root_path)
        Door(None, host, allow_hosts, root_path)  # the middleware is built later, when an error reaches nobody
        os.environ["GRADIO_TEMP_DIR"] = str(self.uploads.folder)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port or 0), family=family)
        except OSError as error:
            raise MossError(f"{host}:{port}: cannot serve there ({error}); choose another --port") from error
        port = listener.getsockname()[1]
        self._application = self._routed(door, root_path)
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
                raise MossError(f"{host}:{port}: the server ended at once; its reason stands above")
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
        """Ends all answers, stops serving, and removes every file."""
        self._closed.set()
        self.sessions.close()
        if self.blocks is not None:
            self.blocks.close(verbose=False)
        if self._server is not None:
            # Ends the pages' heartbeats, for which the server would wait.
            self._loop.call_soon_threadsafe(self._application.routes[-1].app.stop_event.set)
            self._server.should_exit = True
            self.wait()
        self.sessions.close()  # what a last request has created
        shutil.rmtree(self.folder, ignore_errors=True)

    def _serve(self, listener: socket.socket) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[listener])

        asyncio.run(serve())

    def _sweep(self) -> None:
        while not self._closed.wait(SWEEP):
            self.sessions.sweep()
            self.uploads.sweep()

    def _routed(self, door: Middleware, root_path: str) -> FastAPI:
        self.blocks = self._layout()
        self.blocks.queue(max_size=WAITING, api_open=False)
        self.blocks.state_session_capacity = 4 * self.limits.sessions
        routes = [
            Route("/moss/speech/{session}/{key}", self._speech),
            Route("/moss/file/{session}/{name}", self._file),
            # In place of Gradio's own.
            Route("/gradio_api/upload", self.uploads.receive, methods=["POST"]),
            Route("/gradio_api/upload_progress", self._progress),
            Route("/gradio_api/file={path:path}", self._uploaded),
        ]
        # Without a policy of its own Gradio lets pages of any other server read the answers; this one lets none.
        middleware = [
            door,
            Middleware(CORSMiddleware),
            Middleware(OnlyUploads, uploads=self.uploads),
            Middleware(RelativeManifest),
        ]
        application = FastAPI(routes=routes, middleware=middleware, openapi_url=None)
        fonts = ("ui-sans-serif", "system-ui", "sans-serif")  # of the reader's machine: nothing is fetched
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

    # What the page asks for.

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
        """Asks a question, recorded or written, and answers it.

        The conversation goes on from this client's questions before. A question that cannot be taken is an error.
        """
        sampling = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repetition_penalty": repetition_penalty,
            "greedy": greedy,
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
        }
        sampling = {name: value for name, value in sampling.items() if value is not None}
        parts = self._parts
        session = None
        try:
            question = _question(recording, text, you)
            with self.sessions.use(request.session_hash) as session:
                pieces = session.ask(
                    **question,
                    reply=reply,
                    system_turn=DEFAULT_SYSTEM_PROMPT[reply] if system_turn is None else system_turn,
                    voice=None if voice in (DEFAULT_VOICE, ONE_VOICE) else voice,
                    seed=seed,
                    **sampling,
                )
                yield from self._answer(session, pieces, reply)
            return
        except MossError as error:
            refused = _sentence(error)
        except Exception:
            traceback.print_exc()
            refused = "The answer failed inside. The terminal of the server says why."
        finally:
            if recording is not None:
                self.uploads.release(recording)
        # The page gets the conversation as it was before; then page and program get the error.
        talk = self._talk(session) if session is not None else gr.skip()
        yield {parts["talk"]: talk, parts["live"]: "", parts["recording"]: None, **self._busy(False)}
        raise _error(refused, REFUSED)

    def _answer(self, session: Session, pieces: Iterator, reply: str) -> Iterator[dict]:
        """What the page shows while the pieces come, and afterwards."""
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
            words = ""
            speaking = False
            for piece in pieces:
                words += piece.text
                begins = piece.wave.size > 0 and not speaking
                if feed:
                    feed.push(piece.wave)
                if piece.text or begins:  # the card stays as it is otherwise
                    speaking |= begins
                    yield {parts["live"]: cards.answering(reply, words, speaking, address)}
        finally:
            pieces.close()  # where the client has gone; a question without an answer is forgotten
            if feed:
                feed.finish()
        yield {parts["talk"]: self._talk(session), parts["live"]: "", **self._busy(False)}

    def _talk(self, session: Session) -> str:
        return cards.conversation(session.entries, f"moss/file/{session.key}")

    def _busy(self, busy: bool) -> dict:
        return {self._parts["ask"]: gr.Button(interactive=not busy)}

    def _stop(self, request: gr.Request) -> None:
        """Ends the answer that is being generated; what was generated stays."""
        session = self.sessions.get(request.session_hash)
        if session is not None:
            session.stop()

    def _clear(self, request: gr.Request) -> tuple[str, str, None, str]:
        """Forgets the conversation and removes its recordings."""
        self.sessions.clear(request.session_hash)
        return cards.EMPTY, "", None, ""

    def _enrol(self, request: gr.Request, recording: str | None = None) -> Iterator[tuple[None, Any, str]]:
        """Answers with the voice "my recording" sound like this recording from now on."""
        if recording is None:  # the page has cleared it
            yield None, gr.skip(), ""
            return
        try:
            with self.sessions.use(request.session_hash) as session:
                seconds = session.enrol(recording)
            voice = gr.Dropdown([*self._voices(), OWN_VOICE], value=OWN_VOICE)
            yield None, voice, f"Answers now sound like your recording of {seconds:.1f} s."
            return
        except MossError as error:
            refused = _sentence(error)
        finally:
            self.uploads.release(recording)
        yield None, gr.skip(), ""
        raise _error(refused, "No voice from this")

    def _leave(self, request: gr.Request) -> None:
        self.sessions.leave(request.session_hash)

    # What the browser fetches by itself. Keys are secrets, so that a page reaches its own files only.

    def _speech(self, request: Request) -> Response:
        session = self.sessions.with_key(request.path_params["session"])
        feed = session.feed if session is not None else None
        if feed is None or feed.key != request.path_params["key"]:
            return PlainTextResponse("no such answer, or it has been fetched already", 404)
        session.feed = None
        headers = {"X-Sample-Rate": str(feed.sample_rate), "Cache-Control": "no-store"}
        return StreamingResponse(iter(feed), media_type="application/octet-stream", headers=headers)

    def _file(self, request: Request) -> Response:
        session = self.sessions.with_key(request.path_params["session"])
        path = session.file(request.path_params["name"]) if session is not None else None
        if path is None or not path.is_file():
            return PlainTextResponse("no such file; it went with its conversation", 404)
        return FileResponse(path, headers={"Cache-Control": "no-store"})

    def _uploaded(self, request: Request) -> Response:
        path = Path(request.path_params["path"])
        if not (self.uploads.holds(path) and path.is_file()):
            return PlainTextResponse("no such recording", 404)
        headers = {"Cache-Control": "no-store", "Content-Disposition": "attachment"}
        return FileResponse(path, media_type="application/octet-stream", headers=headers)

    def _progress(self, request: Request) -> Response:
        return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    # How it looks.

    def _layout(self) -> gr.Blocks:
        with gr.Blocks(title="MOSS-Speech", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            gr.HTML(
                "<h1>MOSS-Speech</h1><p>Ask aloud or in writing. The answer is spoken while it is still being made. "
                f"Speaking here: <b>{escape(self.name)}</b></p>",
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
                    voice, own, told = self._voice_panel()
                    with gr.Accordion("System prompt", open=False):
                        system_turn = gr.Textbox(
                            DEFAULT_SYSTEM_PROMPT["speech"],
                            label="What the assistant is told first",
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
            # A recording is asked with as soon as it ends, and a file as soon as it is there.
            gr.on([ask.click, text.submit, recording.stop_recording, recording.upload], **asking, api_name="ask")
            # Who begins to speak interrupts the answer.
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
            if own is not None:
                gr.on(
                    [own.upload, own.stop_recording],
                    self._enrol,
                    own,
                    [own, voice, told],
                    concurrency_limit=1,
                    concurrency_id="model",
                    api_name="enrol",
                )
            blocks.unload(self._leave)
        return blocks

    def _voices(self) -> list[str]:
        """What there is to choose from; where the system has no default voice, DEFAULT_VOICE stands for having none."""
        names = self.system.folder.voices()
        if not names and self.system.speech_decoder.config.speaker is None:
            return [ONE_VOICE]
        return names if self.system.folder.settings.get("default_voice") in names else [DEFAULT_VOICE, *names]

    def _voice_panel(self):
        choices = self._voices()
        default = self.system.folder.settings.get("default_voice")
        first = default if default in choices else choices[0]
        voice = gr.Dropdown(choices, value=first, label="Voice of the answers", elem_id="moss-voice", interactive=True)
        if not self.system.can_enrol:
            return voice, None, None
        told = gr.Markdown("", elem_id="moss-voice-told")
        with gr.Accordion("Sound like a recording", open=False):
            gr.Markdown(
                f"Some seconds of clear speech by one person who agrees to it, {self.limits.voice_seconds:.0f} at most."
            )
            own = gr.Audio(
                sources=["upload", "microphone"],
                type="filepath",
                show_label=False,
                elem_id="moss-own-voice",
                buttons=[],
            )
        return voice, own, told


def _sampling_panel(own: dict[str, Any]) -> dict[str, gr.components.Component]:
    """Controls by keyword of `Session.ask`; at first they stand where the system wants them."""
    with gr.Accordion("Sampling", open=False):
        return {
            "temperature": gr.Slider(
                0.1, 2, own["temperature"], step=0.05, label="Temperature", info="higher is more varied"
            ),
            "top_p": gr.Slider(0.05, 1, own["top_p"], step=0.05, label="Top-p", info="1 is off"),
            "top_k": gr.Slider(0, 100, own["top_k"], step=1, label="Top-k", info="0 is off; a new value compiles once"),
            "repetition_penalty": gr.Slider(
                1, 2, own["repetition_penalty"], step=0.05, label="Repetition penalty", info="1 is off"
            ),
            "greedy": gr.Checkbox(own["greedy"], label="Greedy", info="always the likeliest, no sampling"),
            "max_new_tokens": gr.Slider(
                1,
                2000,
                own["max_new_tokens"],
                step=1,
                label="Longest answer",
                info="rows; 12.5 make a second of speech",
            ),
            "min_new_tokens": gr.Slider(
                0, 100, own["min_new_tokens"], step=1, label="Shortest spoken answer", info="rows"
            ),
            "seed": gr.Number(0, precision=0, minimum=0, label="Seed", info="the same seed gives the same answer"),
        }


def _inputs_shown(you: str) -> tuple[Any, Any, Any]:
    return gr.Audio(visible=you == SPEAK), gr.Textbox(visible=you == WRITE), gr.Button(visible=you == WRITE)


def _system_turn(reply: str, shown: str) -> Any:
    """The released driver's system prompt of the kind of answer, unless somebody wrote another one."""
    return DEFAULT_SYSTEM_PROMPT[reply] if shown in DEFAULT_SYSTEM_PROMPT.values() else gr.skip()


def _question(recording: str | None, text: str | None, you: str) -> dict[str, str]:
    """The question as a keyword of `Session.ask`: of the kind that the page shows, or else the one that is there.

    Raises:
        MossError: there is none.
    """
    spoken = {"recording": recording} if recording is not None else None
    written = {"text": text} if text is not None and text.strip() else None
    question = (spoken or written) if you == SPEAK else (written or spoken)
    if question is None:
        what = "record a question or choose a file" if you == SPEAK else "write a question"
        raise MossError(f"{what} first")
    return question


def _error(sentence: str, title: str) -> gr.Error:
    # The page shows the message as HTML; quotes may stay, so that programs get them as they are.
    return gr.Error(escape(sentence, quote=False), title=title, print_exception=False)


def _sentence(error: MossError) -> str:
    line = str(error).splitlines()[0]
    return line[:1].upper() + line[1:] + "."

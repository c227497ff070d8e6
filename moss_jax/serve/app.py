"""The page: how the demo looks, and which press leads where. What happens then is in `session`."""

import os
import secrets
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from moss_jax.dialogue.grid import DEFAULT_SYSTEM
from moss_jax.dialogue.system import System
from moss_jax.errors import MossError
from moss_jax.serve import cards
from moss_jax.serve.feed import SpeechFeed
from moss_jax.serve.session import OWN_VOICE, Limits, Session

try:
    import gradio as gr
    from starlette.requests import Request
    from starlette.responses import FileResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise MossError("the demo needs Gradio: pip install 'moss-jax[serve]'") from error

PAGE = Path(__file__).parent / "page"
WAITING = 20  # questions that may stand in the queue
KEPT = 3600  # s, recordings that were sent but never asked with
SPEAK, WRITE = "Speak", "Write"
REPLIES = (("Aloud", "speech"), ("In writing", "text"))
DEFAULT_VOICE, ONE_VOICE = "no voice in particular", "the one it was trained with"


class Demo:
    """One system for everybody who opens the page, one session for each.

    Args:
        name: of the system, as the page shows it.
        limits: what one person may send.
    """

    def __init__(self, system: System, name: str, limits: Limits | None = None):
        self.system, self.name, self.limits = system, name, limits or Limits()
        self.folder = Path(tempfile.mkdtemp(prefix="moss-jax-demo-"))  # all that lies on disk
        self.sessions: dict[str, Session] = {}
        self._feeds: dict[str, SpeechFeed] = {}  # of each session the latest, until it is fetched
        self.blocks: gr.Blocks | None = None

    def launch(self, host: str = "127.0.0.1", port: int | None = None, block: bool = True) -> str:
        """Serves the page and returns its address; with `block` only when Ctrl-C ends it.

        Raises:
            MossError: the port is taken.
        """
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder / "uploads")
        self.blocks = self._layout()
        self.blocks.queue(max_size=WAITING)
        routes = [Route("/moss/speech/{session}/{key}", self._speech), Route("/moss/file/{session}/{name}", self._file)]
        script = (PAGE / "player.js").read_text(encoding="utf-8")
        fonts = ("ui-sans-serif", "system-ui", "sans-serif")  # of the reader's machine: nothing is fetched
        try:
            _, address, _ = self.blocks.launch(
                server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, inbrowser=False, share=False,
                max_file_size=self.limits.upload_bytes, app_kwargs={"routes": routes}, footer_links=[],
                theme=gr.themes.Default(primary_hue="teal", font=fonts, font_mono=("ui-monospace", "monospace")),
                css_paths=PAGE / "style.css", head=f"<script>{script}</script>", ssr_mode=False,
            )  # fmt: skip
        except OSError as error:
            raise MossError(f"{host}:{port}: cannot serve there ({error}); choose another --port") from error
        if block:
            self.blocks.block_thread()
        return address

    def close(self) -> None:
        """Ends all answers, stops serving, and removes every file."""
        for session in list(self.sessions.values()):
            session.close()
        if self.blocks is not None:
            self.blocks.close(verbose=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    # What the page asks for.

    def _session(self, request: gr.Request) -> Session:
        name = request.session_hash
        if name not in self.sessions:
            self.sessions[name] = Session(self.system, self.folder / secrets.token_hex(8), self.limits)
        return self.sessions[name]

    def _ask(self, request: gr.Request, recording, text, you, reply, voice, system_turn, *values) -> Iterator[dict]:
        parts, session = self._parts, self._session(request)
        files = f"moss/file/{session.key}"
        feed = SpeechFeed(self.system.speech_decoder.config.sample_rate) if reply == "speech" else None
        address = f"moss/speech/{session.key}/{feed.key}" if feed else ""
        refused = {}
        try:
            pieces = session.ask(
                text=(text or "") if you == WRITE else None, recording=recording if you == SPEAK else None, reply=reply,
                system_turn=system_turn, voice=None if voice in (DEFAULT_VOICE, ONE_VOICE) else voice,
                **dict(zip(parts["sampling"], values, strict=True)),
            )  # fmt: skip
            if feed:
                self._feeds[session.key] = feed
            yield {
                parts["talk"]: cards.conversation(session.entries, files),
                parts["live"]: cards.answering(reply, feed=address),
                parts["recording"]: None, parts["text"]: "", **self._busy(True),
            }  # fmt: skip
            words, speaking = "", False
            for piece in pieces:
                words += piece.text
                begins = piece.wave.size > 0 and not speaking
                if feed:
                    feed.push(piece.wave)
                if piece.text or begins:  # the card stays as it is otherwise
                    speaking |= begins
                    yield {parts["live"]: cards.answering(reply, words, speaking, address)}
        except MossError as error:
            refused = {parts["recording"]: None}
            gr.Warning(escape(_sentence(error)), title="That did not work")
        except Exception:
            refused = {parts["recording"]: None}
            traceback.print_exc()
            gr.Warning("The answer failed inside. The terminal of the server says why.", title="That did not work")
        finally:
            if feed:
                feed.finish()
            self._drop(recording)
        talk = cards.conversation(session.entries, files)
        yield {parts["talk"]: talk, parts["live"]: "", **refused, **self._busy(False)}

    def _busy(self, busy: bool) -> dict:
        return {self._parts["ask"]: gr.Button(interactive=not busy)}

    def _stop(self, request: gr.Request) -> None:
        self._session(request).stop()

    def _clear(self, request: gr.Request) -> tuple[str, str, None, str]:
        self._session(request).clear()
        return cards.EMPTY, "", None, ""

    def _enrol(self, request: gr.Request, recording: str | None) -> tuple[None, Any, str]:
        session = self._session(request)
        told, voice = "", gr.skip()
        try:
            if recording is not None:
                seconds = session.enrol(recording)
                choices = [*self._voices(), OWN_VOICE]
                told = f"Answers now sound like your recording of {seconds:.1f} s."
                voice = gr.Dropdown(choices, value=OWN_VOICE)
        except MossError as error:
            gr.Warning(escape(_sentence(error)), title="No voice from this")
        finally:
            self._drop(recording)
        return None, voice, told

    def _leave(self, request: gr.Request) -> None:
        session = self.sessions.pop(request.session_hash, None)
        if session is not None:
            session.close()
            self._feeds.pop(session.key, None)

    def _drop(self, upload: str | None) -> None:
        """Removes what was sent, wherever Gradio has put it below our folder."""
        if upload is not None and Path(upload).is_relative_to(self.folder):
            Path(upload).unlink(missing_ok=True)

    # What the browser fetches by itself. Keys are secrets, so that a page reaches its own files only.

    def _speech(self, request: Request) -> Response:
        feed = self._feeds.get(request.path_params["session"])
        if feed is None or feed.key != request.path_params["key"]:
            return Response("no such answer, or it has been fetched already", 404)
        del self._feeds[request.path_params["session"]]
        headers = {"X-Sample-Rate": str(feed.sample_rate), "Cache-Control": "no-store"}
        return StreamingResponse(iter(feed), media_type="application/octet-stream", headers=headers)

    def _file(self, request: Request) -> Response:
        key, name = request.path_params["session"], request.path_params["name"]
        session = next((session for session in self.sessions.values() if session.key == key), None)
        path = session.file(name) if session else None
        if path is None or not path.is_file():
            return Response("no such file; it went with its conversation", 404)
        return FileResponse(path, headers={"Cache-Control": "no-store"})

    # How it looks.

    def _layout(self) -> gr.Blocks:
        with gr.Blocks(title="MOSS-Speech", analytics_enabled=False, delete_cache=(600, KEPT)) as blocks:
            gr.HTML(
                "<h1>MOSS-Speech</h1><p>Ask aloud or in writing. The answer is spoken while it is still being made. "
                f"Speaking here: <b>{escape(self.name)}</b></p>", elem_id="moss-head",
            )  # fmt: skip
            with gr.Row():
                with gr.Column(scale=5, min_width=380):
                    with gr.Column(elem_id="moss-talk"):
                        talk, live = gr.HTML(cards.EMPTY), gr.HTML("")
                    with gr.Row():
                        you = gr.Radio([SPEAK, WRITE], value=SPEAK, label="You ask", elem_id="moss-you")
                        reply = gr.Radio(list(REPLIES), value="speech", label="It answers", elem_id="moss-reply")
                    recording = gr.Audio(
                        sources=["microphone", "upload"], type="filepath", label="Your question", elem_id="moss-mic",
                        buttons=[],
                    )  # fmt: skip
                    text = gr.Textbox(
                        label="Your question", placeholder="Type it here and press Enter", visible=False, max_lines=5,
                        max_length=self.limits.question_characters, elem_id="moss-text", submit_btn=False,
                    )  # fmt: skip
                    with gr.Row():
                        ask = gr.Button("Ask", variant="primary", scale=3, visible=False, elem_id="moss-ask")
                        stop = gr.Button("Stop the answer", scale=2, elem_id="moss-stop")
                        clear = gr.Button("Clear", scale=1, elem_id="moss-clear")
                with gr.Column(scale=2, min_width=260):
                    voice, own, told = self._voice_panel()
                    with gr.Accordion("System prompt", open=False):
                        system_turn = gr.Textbox(
                            DEFAULT_SYSTEM["speech"],
                            label="What the assistant is told first",
                            lines=4,
                            max_length=2000,
                            elem_id="moss-system",
                        )
                    sampling = _sampling_panel(self.system.sampling)
            self._parts = {"talk": talk, "live": live, "recording": recording, "text": text, "ask": ask,
                           "sampling": list(sampling)}  # fmt: skip
            asking = {
                "fn": self._ask,
                "inputs": [recording, text, you, reply, voice, system_turn, *sampling.values()],
                "outputs": [talk, live, recording, text, ask],
                "concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "multiple",
                "show_progress": "hidden",
            }  # fmt: skip
            # A recording is asked with as soon as it ends, and a file as soon as it is there.
            gr.on([ask.click, text.submit, recording.stop_recording, recording.upload], **asking, api_name="ask")
            # Who begins to speak interrupts the answer.
            gr.on([stop.click, recording.start_recording], self._stop, queue=False, api_name="stop")
            clear.click(self._clear, outputs=[talk, live, recording, text], queue=False, api_name="clear")
            you.change(_inputs_shown, you, [recording, text, ask], queue=False, show_progress="hidden")
            reply.change(_system_turn, [reply, system_turn], system_turn, queue=False, show_progress="hidden")
            if own is not None:
                gr.on(
                    [own.upload, own.stop_recording], self._enrol, own, [own, voice, told], concurrency_limit=1,
                    concurrency_id="model", api_name="enrol",
                )  # fmt: skip
            blocks.unload(self._leave)
        return blocks

    def _voices(self) -> list[str]:
        """What there is to choose from; where the system has no default voice, DEFAULT_VOICE stands for having none."""
        names = self.system.folder.voices()
        if not names and self.system.speech_decoder.config.speaker is None:
            return [ONE_VOICE]
        return names if self.system.folder.settings.get("default_voice") in names else [DEFAULT_VOICE, *names]

    def _voice_panel(self):
        choices, default = self._voices(), self.system.folder.settings.get("default_voice")
        first = default if default in choices else choices[0]
        voice = gr.Dropdown(choices, value=first, label="Voice of the answers", elem_id="moss-voice", interactive=True)
        if not self.system.enrols:
            return voice, None, None
        told = gr.Markdown("", elem_id="moss-voice-told")
        with gr.Accordion("Sound like a recording", open=False):
            gr.Markdown(
                f"Some seconds of clear speech by one person who agrees to it, {self.limits.voice_seconds:.0f} at most."
            )
            own = gr.Audio(
                sources=["upload", "microphone"], type="filepath", show_label=False, elem_id="moss-own-voice",
                buttons=[],
            )  # fmt: skip
        return voice, own, told


def _sampling_panel(own: dict[str, Any]) -> dict[str, gr.components.Component]:
    """Controls by keyword of `Session.ask`; at first they stand where the system wants them."""
    with gr.Accordion("Sampling", open=False):
        return {
            "temperature": gr.Slider(
                0.1, 2, own["temperature"], step=0.05, label="Temperature", info="higher is more varied"
            ),
            "top_p": gr.Slider(0.05, 1, own["top_p"], step=0.05, label="Top-p", info="1 is off"),
            "top_k": gr.Slider(
                0, 100, own["top_k"], step=1, label="Top-k", info="0 is off; a new value compiles once"
            ),
            "repetition_penalty": gr.Slider(
                1, 2, own["repetition_penalty"], step=0.05, label="Repetition penalty", info="1 is off"
            ),
            "greedy": gr.Checkbox(own["greedy"], label="Greedy", info="always the likeliest, no sampling"),
            "max_new_tokens": gr.Slider(
                1, 2000, own["max_new_tokens"], step=1, label="Longest answer",
                info="rows; 12.5 make a second of speech",
            ),
            "min_new_tokens": gr.Slider(
                0, 100, own["min_new_tokens"], step=1, label="Shortest spoken answer", info="rows"
            ),
            "seed": gr.Number(0, precision=0, minimum=0, label="Seed", info="the same seed gives the same answer"),
        }  # fmt: skip


def _inputs_shown(you: str) -> tuple[Any, Any, Any]:
    return gr.Audio(visible=you == SPEAK), gr.Textbox(visible=you == WRITE), gr.Button(visible=you == WRITE)


def _system_turn(reply: str, shown: str) -> Any:
    """The released driver's system prompt of the kind of answer, unless somebody wrote another one."""
    return DEFAULT_SYSTEM[reply] if shown in DEFAULT_SYSTEM.values() else gr.skip()


def _sentence(error: MossError) -> str:
    line = str(error).splitlines()[0]
    return line[:1].upper() + line[1:] + "."

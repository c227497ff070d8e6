"""Drives the demo in a real browser, and keeps what its speaker played. Run by hand:

  python tests/serve/browser.py --model FOLDER --question QUESTION.wav --out OUT

The microphone hears silence after the question, for as long as the recording goes on.

Needs Debian's chromium (`apt-get install chromium`) and the extra `serve`; nothing else. The script starts the demo,
opens the page with a fake microphone that hears QUESTION.wav, and does what a person does: ask aloud and hear the
answer, ask a second time in writing, change to written answers, press Stop while the answer is heard, Clear.
OUT gets screenshots, `played-N.wav` (what the sound card was given, recorded behind the player, silence included),
`answer-N.wav` (the file that the page offers to play again) and `report.json`. It exits with 1 when something that a
person would see or hear did not happen.
"""

import argparse
import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parents[2]

# Behind the player's output, before the loudspeaker: what is heard, gaps and all.
TAP = """
window.mossTap = [];
document.addEventListener("moss-player", (event) => {
  const { context, output } = event.detail;
  const tap = context.createScriptProcessor(4096, 1, 1);
  tap.onaudioprocess = (piece) => window.mossTap.push(new Float32Array(piece.inputBuffer.getChannelData(0)));
  output.connect(tap);
  tap.connect(context.destination);
});
window.mossTaken = () => {
  const pieces = window.mossTap;
  window.mossTap = [];
  const all = new Int16Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) for (const x of piece) all[at++] = Math.round(32767 * Math.max(-1, Math.min(1, x)));
  const bytes = new Uint8Array(all.buffer);
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(text);
};
"""


class Browser:
    """Chromium by its debugging pipe."""

    def __init__(self, question: Path, size: tuple[int, int]):
        self.home = tempfile.mkdtemp(prefix="moss-browser-")
        commands = os.pipe()
        answers = os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--remote-debugging-pipe",
            f"--user-data-dir={self.home}",
            f"--window-size={size[0]},{size[1]}",
            "--use-fake-ui-for-media-stream",
            "--use-fake-device-for-media-stream",
            f"--use-file-for-fake-audio-capture={question}%noloop",
            "--disable-background-networking",
            "--disable-component-update",
            "--force-color-profile=srgb",
        ]
        shell = f'exec "$0" "$@" 3<&{commands[0]} 4>&{answers[1]}'
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            raise SystemExit("no chromium here: apt-get install chromium")
        self.process = subprocess.Popen(
            ["sh", "-c", shell, program, *flags], pass_fds=(commands[0], answers[1]), stderr=subprocess.DEVNULL
        )
        os.close(commands[0])
        os.close(answers[1])
        self._out = os.fdopen(commands[1], "wb", 0)
        self._in = os.fdopen(answers[0], "rb", 0)
        self._rest = b""
        self._count = 0
        self.problems = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._page = None
        self._page = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False
        )
        self.send("Page.addScriptToEvaluateOnNewDocument", source=TAP)

    def send(self, method: str, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if getattr(self, "_page", None):
            message["sessionId"] = self._page
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            piece = self._in.read(1 << 20)
            if not piece:
                raise RuntimeError("the browser has gone")
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict) -> None:
        params = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"].get("text", "exception"))
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}".strip())

    def run(self, script: str):
        """The value of a script's expression; promises are waited for."""
        result = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, script: str, what: str, seconds: float):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(f"(value => value instanceof Node || value)({script})"):
                return value
            time.sleep(0.05)
        raise TimeoutError(f"waited {seconds:.0f} s for: {what}")

    def press(self, selector: str) -> None:
        """A real press of the mouse in the middle of an element."""
        box = self.run(f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            if (!e) return null; e.scrollIntoView({{block: "center"}}); const b = e.getBoundingClientRect();
            return [b.x + b.width / 2, b.y + b.height / 2]; }})()""")
        if box is None:
            raise RuntimeError(f"nothing to press: {selector}")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def write(self, selector: str, text: str) -> None:
        self.press(selector)
        self.send("Input.insertText", text=text)

    def shot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
        shutil.rmtree(self.home, ignore_errors=True)


PAUSE = 10  # s; where its file ends, the fake microphone repeats the last thing it has: a hum


def for_microphone(question: Path, folder: Path) -> Path:
    """The question with a pause behind it, as a file in `folder`."""
    wave, rate = soundfile.read(question, dtype="int16")
    path = folder / "microphone.wav"
    soundfile.write(path, np.concatenate([wave, np.zeros((PAUSE * rate, *wave.shape[1:]), wave.dtype)]), rate)
    return path


MIC = "#moss-mic button.record-button"
MIC_STOP = "#moss-mic button.stop-button"
ANSWERS = "document.querySelectorAll('#moss-talk .moss-assistant:not(.moss-answering *)').length"
WARNING = "[...document.querySelectorAll('[data-testid=toast-text]')].map(e => e.innerText).join(' | ')"


def visit(browser: Browser, address: str, out: Path, patience: float, question: Path) -> dict:
    report: dict = {"steps": []}

    def step(name: str, **facts) -> None:
        shown = "[...document.querySelectorAll('.moss-picture')].every(picture => picture.complete)"
        browser.wait(shown, "the pictures", patience)
        browser.shot(out / f"{len(report['steps']) + 1}-{name}.png")
        report["steps"].append({"name": name, **facts})
        print(name, facts, flush=True)

    def playback(number: int | str) -> dict:
        """Waits until the page has played its latest answer, or stopped to, and keeps it."""
        browser.wait("mossPlayer.stats.length && mossPlayer.stats.at(-1).first", "the first sound", patience)
        browser.wait("mossPlayer.stats.at(-1).done", "the end of the sound", patience)
        time.sleep(0.5)
        stats = browser.run("mossPlayer.stats.at(-1)")
        rate = browser.run("mossPlayer.context.sampleRate")
        played = np.frombuffer(base64.b64decode(browser.run("mossTaken()")), "<i2")
        loud = np.flatnonzero(played)
        played = played[loud[0] : loud[-1] + 1] if loud.size else played[:0]
        soundfile.write(out / f"played-{number}.wav", played, int(rate))
        return {
            "press_to_sound_s": round(stats["first"] - stats["pressed"], 3),
            "gaps": stats["gaps"],
            "gap_s": round(stats["gapSeconds"], 3),
            "sent_s": round(stats["samples"] / rate, 3),
            "played_s": round(len(played) / rate, 3),
        }

    def answer(number: int | str, count: int) -> str:
        browser.wait(f"{ANSWERS} >= {count}", f"answer {count} in the conversation", patience)
        file = browser.run("[...document.querySelectorAll('#moss-talk .moss-assistant audio')].at(-1)?.src")
        if file:
            data = browser.run(f"""fetch({json.dumps(file)}).then(r => r.arrayBuffer()).then(b => {{ let t = "";
                const u = new Uint8Array(b); for (let i = 0; i < u.length; i += 32768)
                t += String.fromCharCode(...u.subarray(i, i + 32768)); return btoa(t); }})""")
            (out / f"answer-{number}.wav").write_bytes(base64.b64decode(data))
        return browser.run("[...document.querySelectorAll('#moss-talk .moss-assistant')].at(-1).innerText")

    browser.send("Page.navigate", url=address)
    browser.wait("document.querySelector('#moss-clear') && window.mossPlayer", "the page", 60)
    time.sleep(1.5)
    step("opened")

    browser.press(MIC)
    browser.wait(f"document.querySelector({json.dumps(MIC_STOP)})?.offsetParent", "the recording", 20)
    time.sleep(soundfile.info(question).duration + 1.0)
    step("recording")
    browser.press(MIC_STOP)
    browser.wait("mossPlayer.stats.length", "the answer", patience)
    step("answering")
    facts = playback(1)
    step("heard", text=answer(1, 1), **facts)

    browser.press("#moss-you label:nth-child(2)")
    browser.wait("document.querySelector('#moss-text textarea')?.offsetParent", "the text field", 20)
    browser.write("#moss-text textarea", "And plus one?")
    browser.press("#moss-ask")
    browser.wait("mossPlayer.stats.length >= 2", "the second answer", patience)
    facts = playback(2)
    step("second-turn", text=answer(2, 2), **facts)

    browser.press("#moss-reply label:nth-child(2)")
    time.sleep(0.5)
    browser.write("#moss-text textarea", "What is the capital of France?")
    browser.press("#moss-ask")
    text = browser.wait(
        f"{ANSWERS} >= 3 && [...document.querySelectorAll('#moss-talk .moss-assistant')].at(-1).innerText",
        "the written answer",
        patience,
    )
    step("written", text=text, players=browser.run("mossPlayer.stats.length"))

    browser.press("#moss-reply label:nth-child(1)")
    time.sleep(0.5)
    browser.write("#moss-text textarea", "Read back the digits three one four.")
    browser.press("#moss-ask")
    browser.wait("mossPlayer.stats.length >= 3 && mossPlayer.stats.at(-1).first", "the third sound", patience)
    browser.wait("performance.now() / 1000 > mossPlayer.stats.at(-1).first + 0.4", "some of it to be heard", 5)
    before = browser.run("performance.now() / 1000 - mossPlayer.stats.at(-1).first")
    browser.press("#moss-stop")
    pressed = time.monotonic()
    facts = playback("stopped")
    text = answer("stopped", 4)
    made = soundfile.info(out / "answer-stopped.wav").duration
    step(
        "stopped",
        text=text,
        made_s=made,
        pressed_s=round(before, 3),
        settled_s=round(time.monotonic() - pressed, 2),
        **facts,
    )

    browser.press("#moss-ask")
    browser.wait(f"({WARNING}).length", "a word about the empty question", 30)
    step(
        "nothing-asked",
        text=browser.run(WARNING),
        answers=browser.run(ANSWERS),
        ask_again=browser.run("!document.querySelector('#moss-ask').disabled"),
    )

    files = browser.run("[...document.querySelectorAll('#moss-talk audio')].map(e => e.src)")
    browser.press("#moss-clear")
    browser.wait("document.querySelector('#moss-talk .moss-empty')", "an empty conversation", 30)
    gone = browser.run(f"Promise.all({json.dumps(files)}.map(f => fetch(f, {{cache: 'reload'}}).then(r => r.status)))")
    step("cleared", files=gone)
    report["problems"] = [line for line in browser.problems if "404" not in line]
    return report


def check(report: dict) -> list[str]:
    """What a person would complain about."""
    steps = {step["name"]: step for step in report["steps"]}
    wrong = [f"in the page's console: {line}" for line in report["problems"]]
    for name in ("heard", "second-turn"):
        if steps[name]["sent_s"] <= 0:
            wrong.append(f"{name}: no sound")
        missing = steps[name]["sent_s"] + steps[name]["gap_s"] - steps[name]["played_s"]
        if abs(missing) > 0.3:
            wrong.append(f"{name}: {missing:.2f} s of the answer were not played")
    if steps["written"]["players"] != 2:
        wrong.append("written: it was spoken too")
    stopped = steps["stopped"]
    if stopped["played_s"] > stopped["pressed_s"] + 0.5:
        wrong.append("stopped: the sound went on")
    if stopped["played_s"] > stopped["made_s"] - 0.3 and "stopped" not in stopped["text"]:
        wrong.append("stopped: the answer was made and played to its end")
    refused = steps["nothing-asked"]
    if refused["answers"] != 4 or not refused["ask_again"]:
        wrong.append("nothing-asked: the conversation has changed, or one cannot ask again")
    if set(steps["cleared"]["files"]) != {404}:
        wrong.append("cleared: there are files left")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="as for moss-jax demo")
    parser.add_argument("--question", required=True, type=Path, help="a wav file for the microphone")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--port", type=int, default=7899)
    parser.add_argument("--patience", type=float, default=300, help="seconds that an answer may take")
    parser.add_argument("--size", default="1280x1000")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = [] if args.model is None else ["--model", args.model]
    command = [sys.executable, "-m", "moss_jax", "demo", *model, "--port", str(args.port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    browser = None
    try:
        for line in server.stderr:
            print(line, end="", flush=True)
            if line.startswith("open http"):
                break
        else:
            return 1
        address = line.split()[1]
        browser = Browser(for_microphone(args.question, args.out).resolve(), tuple(map(int, args.size.split("x"))))
        try:
            report = visit(browser, address, args.out, args.patience, args.question)
        except BaseException:
            browser.shot(args.out / "failed.png")
            raise
    finally:
        if browser is not None:
            browser.close()
        server.send_signal(signal.SIGTERM)
        try:
            left = server.communicate(timeout=120)[1]
        except subprocess.TimeoutExpired:
            server.kill()
            left = "the demo did not end by itself"
    if left.strip():
        print(left)
    report["wrong"] = check(report)
    (args.out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    for line in report["wrong"]:
        print(f"wrong: {line}")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())

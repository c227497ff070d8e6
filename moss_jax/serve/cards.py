"""Turns as HTML. What people and the model wrote is escaped; addresses are relative to the page's."""

from collections.abc import Sequence
from html import escape

from moss_jax.serve.session import Entry

WHO = {"user": "You", "assistant": "MOSS-Speech"}

EMPTY = """
<div class="moss-empty">
  <p class="moss-empty-title">Ask something</p>
  <ol>
    <li>Press <b>Record</b>, say your question, press <b>Stop</b>. Or choose <b>Write</b> and type it.</li>
    <li>The answer starts to play while it is still being made.</li>
    <li>Ask on: it remembers what was said. <b>Clear</b> forgets it all.</li>
  </ol>
</div>
"""


def conversation(entries: Sequence[Entry], address: str) -> str:
    """All turns, or what to do when there is none.

    Args:
        address: what stands before the name of a file.
    """
    if not entries:
        return EMPTY
    waiting = entries[-1] if entries[-1].role == "user" else None  # a picture would take time from its answer
    return "".join(card(entry, address, entry is not waiting) for entry in entries)


def card(entry: Entry, address: str, pictured: bool = True) -> str:
    """One turn: its words, its sound to play again, its picture, its times, its notices."""
    parts = []
    if entry.text:
        parts.append(f'<p class="moss-text">{escape(entry.text)}</p>')
    if entry.audio is not None:
        parts.append(f'<audio controls preload="none" src="{address}/{entry.audio.name}"></audio>')
    if entry.audio is not None and pictured:
        what = f"waveform and spectrogram of {entry.seconds:.1f} seconds"
        parts.append(f'<img class="moss-picture" alt="{what}" src="{address}/{entry.audio.stem}.png">')
    if not parts:
        parts.append('<p class="moss-text moss-faint">(nothing was said)</p>')
    parts += [f'<p class="moss-notice">{escape(notice)}</p>' for notice in entry.notices]
    if line := times(entry):
        parts.append(f'<p class="moss-times">{line}</p>')
    return _framed(entry.role, "".join(parts))


def times(entry: Entry) -> str:
    """How fast the answer was, in one line; empty for a question."""
    if entry.spent is None:
        return f"{entry.seconds:.1f} s" if entry.seconds else ""
    told = []
    if entry.first is not None:
        told.append(f"first {'sound' if entry.audio else 'words'} after <b>{entry.first:.2f} s</b>")
    if entry.real_time_factor is not None:
        told.append(f"{entry.seconds:.1f} s of speech made in {entry.spent:.1f} s")
        told.append(f"real-time factor <b>{entry.real_time_factor:.2f}</b>")
    else:
        told.append(f"done after {entry.spent:.1f} s")
    return " · ".join(told)


def answering(reply: str, text: str = "", speaking: bool = False, feed: str = "") -> str:
    """The answer that is being made.

    Args:
        text, speaking: what there is of it so far.
        feed: address of its sound, which the page's player starts to play when it sees it here.
    """
    if text:
        inside = f'<p class="moss-text">{escape(text)}<span class="moss-caret"></span></p>'
    else:
        told = "speaking, while the rest is being made" if speaking else "listening and thinking"
        inside = f'<p class="moss-faint"><span class="moss-bars"><i></i><i></i><i></i><i></i></span>{told}</p>'
    speech = f' data-speech="{escape(feed)}"' if reply == "speech" else ""
    return f'<div class="moss-answering"{speech}>{_framed("assistant", inside)}</div>'


def _framed(role: str, inside: str) -> str:
    return f'<div class="moss-turn moss-{role}"><div class="moss-who">{WHO[role]}</div>{inside}</div>'

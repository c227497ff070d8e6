"""Turns as HTML. Texts are escaped; addresses are relative to that of the page."""

from collections.abc import Sequence
from html import escape

from moss_jax.serve.session import Entry

WHO = {"user": "You", "assistant": "MOSS-Speech"}

EMPTY = """
<div class="moss-empty">
  <p class="moss-empty-title">Ask something</p>
  <ol>
    <li>Press <b>Record</b>, ask your question, press <b>Stop</b>. Or choose <b>Write</b> and type it.</li>
    <li>The answer starts to play while it is being generated.</li>
    <li>Continue with another question. <b>Clear</b> deletes the conversation.</li>
  </ol>
</div>
"""


def conversation(entries: Sequence[Entry], address: str) -> str:
    """All turns, or instructions if there are none.

    Args:
        address: the address of the folder with the recordings.
    """
    if not entries:
        return EMPTY
    # Drawing the picture of the question would delay its answer.
    unanswered = entries[-1] if entries[-1].role == "user" else None
    return "".join(card(entry, address, entry is not unanswered) for entry in entries)


def card(entry: Entry, address: str, pictured: bool = True) -> str:
    """One turn: text, audio player, picture, times and notices."""
    parts = []
    if entry.text:
        parts.append(f'<p class="moss-text">{escape(entry.text)}</p>')
    if entry.audio is not None:
        parts.append(f'<audio controls preload="none" src="{address}/{entry.audio.name}"></audio>')
    if entry.audio is not None and pictured:
        description = f"waveform and spectrogram of {entry.seconds:.1f} seconds"
        parts.append(f'<img class="moss-picture" alt="{description}" src="{address}/{entry.audio.stem}.png">')
    if not parts:
        parts.append('<p class="moss-text moss-faint">(empty)</p>')
    parts += [f'<p class="moss-notice">{escape(notice)}</p>' for notice in entry.notices]
    if line := times(entry):
        parts.append(f'<p class="moss-times">{line}</p>')
    return _framed(entry.role, "".join(parts))


def times(entry: Entry) -> str:
    """Duration and latency in one line; empty if there is nothing to show."""
    if entry.spent is None:
        return f"{entry.seconds:.1f} s" if entry.seconds else ""
    facts = []
    if entry.first is not None:
        facts.append(f"first {'audio' if entry.audio else 'text'} after <b>{entry.first:.2f} s</b>")
    if entry.real_time_factor is not None:
        facts.append(f"{entry.seconds:.1f} s of speech generated in {entry.spent:.1f} s")
        facts.append(f"real-time factor <b>{entry.real_time_factor:.2f}</b>")
    else:
        facts.append(f"done after {entry.spent:.1f} s")
    return " · ".join(facts)


def answering(reply: str, text: str = "", speaking: bool = False, feed: str = "") -> str:
    """The answer that is being generated.

    Args:
        reply: "speech" or "text".
        text: what was generated so far.
        speaking: whether audio has been generated.
        feed: address of the audio; the player of the page starts to play it when it appears here.
    """
    if text:
        inside = f'<p class="moss-text">{escape(text)}<span class="moss-caret"></span></p>'
    else:
        status = "speaking" if speaking else "thinking"
        inside = f'<p class="moss-faint"><span class="moss-bars"><i></i><i></i><i></i><i></i></span>{status}</p>'
    speech = f' data-speech="{escape(feed)}"' if reply == "speech" else ""
    return f'<div class="moss-answering"{speech}>{_framed("assistant", inside)}</div>'


def _framed(role: str, inside: str) -> str:
    return f'<div class="moss-turn moss-{role}"><div class="moss-who">{WHO[role]}</div>{inside}</div>'

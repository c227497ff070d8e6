"""Pictures of the recordings: the waveform, and below it the mel spectrogram on the same time axis."""

import io
from pathlib import Path

import jax
import numpy as np

from moss_jax.audio.features import MEL_24K, mel_24k
from moss_jax.audio.wave import resample
from moss_jax.files import atomic_file

COLOURS = {"user": ("#2563eb", "Blues"), "assistant": ("#0d9488", "BuGn")}  # waveform, spectrogram
COLUMNS = 900  # of the waveform: about the width in pixels
FLOOR = -9.0  # log mel magnitude (natural) that is drawn as background
INK = "#71717a"  # readable on light and dark pages


def draw(path: str | Path, wave: np.ndarray, rate: int, role: str) -> None:
    """Writes a png of a wave float32 [T] at `rate` Hz atomically, in the colours of a role ("user" or "assistant")."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colour, shades = COLOURS[role]
    seconds = len(wave) / rate
    figure = Figure(figsize=(7.2, 1.9), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 1.5], "hspace": 0.02})
    low, high = envelope(wave, COLUMNS)
    times = np.linspace(0, seconds, len(low))
    top.fill_between(times, low, high, color=colour, linewidth=0.4)
    limit = max(0.05, float(np.abs(wave).max()))  # quiet noise is not scaled up to full height
    top.set(ylim=(-limit, limit), yticks=[], xlim=(0, seconds))
    frames = mel(resample(wave, rate, MEL_24K.sample_rate))
    bottom.imshow(
        frames.T,
        origin="lower",
        aspect="auto",
        cmap=shades,
        vmin=FLOOR,
        vmax=max(FLOOR + 3, float(frames.max())),
        extent=(0, seconds, 0, MEL_24K.num_mel_bins),
    )
    bottom.set(yticks=[])
    bottom.set_xlabel("seconds", fontsize=7, color=INK, labelpad=1)
    bottom.tick_params(labelsize=7, colors=INK, length=2, pad=1)
    top.tick_params(length=0, labelbottom=False)
    for axis in (top, bottom):
        axis.set_facecolor("none")
        for side in axis.spines.values():
            side.set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, transparent=True)
    with atomic_file(path) as part:
        part.write_bytes(picture.getvalue())


def envelope(wave: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum of each of at most `columns` equal segments of a wave [T]."""
    starts = np.unique(np.linspace(0, len(wave), columns, endpoint=False).astype(int))
    return np.minimum.reduceat(wave, starts), np.maximum.reduceat(wave, starts)


def mel(wave: np.ndarray) -> np.ndarray:
    """The mel spectrogram of the speech decoder, float32 [T, M], of a wave float32 [samples] at 24 kHz.

    Waves are padded to a few lengths, so that few programs are compiled.
    """
    bucket = 2 * MEL_24K.sample_rate
    while bucket < len(wave):
        bucket *= 2
    length = max(len(wave), MEL_24K.n_fft)
    padded = np.zeros((1, bucket), np.float32)
    padded[0, : len(wave)] = wave
    return np.asarray(_mel(padded, np.array([length], np.int32)))[0, : length // MEL_24K.hop_length]


@jax.jit
def _mel(wave: jax.Array, length: jax.Array) -> jax.Array:
    return mel_24k(wave, length)

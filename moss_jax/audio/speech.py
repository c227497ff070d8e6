"""The rule that decides whether a recording can hold speech at all; the same for every part of the package."""

import numpy as np

from moss_jax.errors import MossError

FRAME_SECONDS = 0.025
MIN_SECONDS = 0.1  # a recording needs this much sound above FLOOR_DBFS: four frames
# Speech recorded at a normal level reaches about -20 dBFS in its loud frames. The noise of 16-bit samples is at
# -98 dBFS. The floor leaves speech that is 35 dB quieter than normal well above it.
FLOOR_DBFS = -70.0


def check_speech(wave: np.ndarray, rate: int, what: str = "the recording") -> None:
    """Raises MossError unless `wave` can hold speech: at least 0.1 s of it is louder than -70 dBFS.

    Args:
        wave: float32 [samples], mono, finite.
        rate: samples per second, Hz.
        what: the name of the recording in the error, such as its path.

    Raises:
        MossError: the wave is too short, silent or nearly silent. A constant offset (DC) counts as silence.
    """
    seconds = len(wave) / rate
    if seconds < MIN_SECONDS:
        raise MossError(f"{what}: {seconds:.3g} s is too short to hold speech, expected at least {MIN_SECONDS} s")
    level = speech_level(wave, rate)
    if level < FLOOR_DBFS:
        found = "digital silence" if np.isneginf(level) else f"its level is {level:.0f} dBFS"
        needed = f"sound above {FLOOR_DBFS:.0f} dBFS for at least {MIN_SECONDS} s"
        raise MossError(f"{what}: no speech found ({found}), expected {needed}")


def speech_level(wave: np.ndarray, rate: int) -> float:
    """The level in dBFS that `wave`, float32 [samples], reaches or exceeds for 0.1 s in total; -inf for silence.

    It is measured in frames of 25 ms without their mean, so that neither a click nor a constant offset counts.
    """
    length = max(1, round(FRAME_SECONDS * rate))
    count = round(MIN_SECONDS / FRAME_SECONDS)
    frames = wave[: len(wave) // length * length].reshape(-1, length)
    if len(frames) < count:
        return -np.inf
    power = np.sort(frames.var(1, dtype=np.float64))[-count]
    # Rounding leaves about 1e-17 of the squared offset in the variance of a constant.
    return float(10 * np.log10(power)) if power > 1e-14 else -np.inf

"""What an array of samples may be, and 16-bit samples in and out."""

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from moss_jax.audio import as_recording, from_pcm16, load_audio, save_audio, to_pcm16
from moss_jax.dialogue.turns import Turn
from moss_jax.errors import MossError
from moss_jax.serve.feed import samples

WAVE = np.random.default_rng(0).normal(0, 0.1, 1000).astype(np.float32)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8"])
def test_integers_are_converted_by_their_scale(dtype):
    scale = 2.0 ** (np.dtype(dtype).itemsize * 8 - 1)
    integers = (np.rint(WAVE * scale) + (scale if dtype == "uint8" else 0)).astype(dtype)
    read = as_recording(integers, 16000)
    assert read.wave.dtype == np.float32
    np.testing.assert_allclose(read.wave, WAVE, atol=0.51 / scale + 1e-7)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_floats_are_taken_as_they_are(dtype):
    np.testing.assert_allclose(as_recording(WAVE.astype(dtype), 16000).wave, WAVE, atol=5e-4)


@pytest.mark.parametrize("dtype", ["int64", "uint16", "uint32", "uint64", "bool", "complex64", "O", "U3"])
def test_other_types_are_refused(dtype):
    with pytest.raises(MossError, match="expected floats from -1 to 1"):
        as_recording(np.ones(10).astype(dtype), 16000)


@pytest.mark.parametrize(("factor", "divisor"), [(32767, 32768), (100, 32768), (2**23 - 1, 2**23), (2.0**31, 2**31)])
def test_floats_of_another_scale_are_refused(factor, divisor):
    with pytest.raises(MossError, match=f"divide them by {divisor} if they are integers"):
        as_recording(WAVE / np.abs(WAVE).max() * factor, 16000)
    np.testing.assert_array_equal(as_recording(WAVE * 20, 16000).wave, WAVE * 20)  # a loud mix is no other scale


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(value):
    wave = WAVE.copy()
    wave[7] = value
    with pytest.raises(MossError, match="sample 7 is NaN or infinite"):
        as_recording(wave, 16000)


def test_the_longer_axis_is_time():
    both = np.stack([WAVE, WAVE / 2])
    for array in (both, both.T):
        np.testing.assert_allclose(as_recording(array, 16000).wave, WAVE * 0.75, atol=1e-7)
    for one in (WAVE[None], WAVE[:, None]):
        np.testing.assert_array_equal(as_recording(one, 16000).wave, WAVE)
    (notice,) = as_recording(np.stack([WAVE, -WAVE]), 16000, "turn of user").notices
    assert notice.startswith("turn of user: its 2 channels cancel")


@pytest.mark.parametrize("shape", [(), (2, 2), (3, 4, 5), (100, 100), (200, 65), (0, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(MossError, match=r"shape|0 samples"):
        as_recording(np.zeros(shape, np.float32), 16000)


@pytest.mark.parametrize("rate", [48000, 48000.0, "48000", " 48000 ", "48000.0", np.int64(48000), np.float32(48000)])
def test_a_whole_rate_of_any_type_is_taken(rate):
    found = as_recording(WAVE, rate).rate
    assert found == 48000 and type(found) is int
    assert Turn("user", audio=WAVE, sample_rate=rate).sample_rate is rate


@pytest.mark.parametrize(
    "rate", [0, -1, 999, 768001, 44100.5, "fast", "", True, np.nan, np.inf, [16000], None, b"x", 1e30, 10**400]
)
def test_other_rates_are_refused(rate):
    with pytest.raises(MossError, match=r"sample rate|sample_rate") as error:
        as_recording(WAVE, rate)
    assert "\n" not in str(error.value)
    with pytest.raises(MossError, match=r"sample rate|sample_rate"):
        Turn("user", audio=WAVE, sample_rate=rate)


# 16-bit samples


@given(st.lists(st.integers(-32768, 32767)))
def test_sixteen_bits_survive_a_round_trip(values):
    integers = np.array(values, np.int16)
    np.testing.assert_array_equal(to_pcm16(from_pcm16(integers)), integers)


def test_what_exceeds_full_scale_is_clipped_and_the_rest_is_rounded():
    wave = np.array([-2, -1, -0.6 / 32768, 0.4 / 32768, 0.6 / 32768, 1, 2], np.float32)
    np.testing.assert_array_equal(to_pcm16(wave), [-32768, -32768, -1, 0, 1, 32767, 32767])
    assert to_pcm16(wave).dtype == np.dtype("<i2")


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_files_and_streams_hold_the_same_samples(name, tmp_path):
    wave = np.concatenate([WAVE * 20, np.linspace(-1.1, 1.1, 5000)]).astype(np.float32)
    save_audio(tmp_path / name, wave, 24000)
    stored, _ = soundfile.read(tmp_path / name, dtype="int16")
    np.testing.assert_array_equal(stored, to_pcm16(wave))
    assert samples(wave) == to_pcm16(wave).tobytes()
    again, _ = load_audio(tmp_path / name)
    np.testing.assert_array_equal(again, from_pcm16(to_pcm16(wave)))
    memory = io.BytesIO()
    soundfile.write(memory, to_pcm16(again), 24000, format="WAV", subtype="PCM_16")
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(memory.getvalue()), dtype="int16")[0], stored)

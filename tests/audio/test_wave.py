"""Loading, saving and resampling."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.audio import load_audio, resample, save_audio, segments
from moss_jax.errors import MossError

TONE = (0.5 * np.sin(np.arange(4800) * 0.05)).astype(np.float32)


@pytest.mark.parametrize(
    ("ending", "subtype", "tolerance"),
    [
        ("wav", "PCM_U8", 1e-2),
        ("wav", "PCM_16", 4e-5),
        ("wav", "PCM_24", 2e-7),
        ("wav", "PCM_32", 1e-7),
        ("wav", "FLOAT", 0),
        ("wav", "DOUBLE", 0),
        ("flac", "PCM_16", 4e-5),
        ("flac", "PCM_24", 2e-7),
    ],
)
@pytest.mark.parametrize(("rate", "channels"), [(96000, 1), (8000, 6), (44100, 2)])
def test_load_reads_every_width_rate_and_channel_count(tmp_path, ending, subtype, tolerance, rate, channels):
    gains = np.linspace(0.2, 1, channels)
    soundfile.write(tmp_path / f"a.{ending}", TONE[:, None] * gains, rate, subtype=subtype)
    wave, found = load_audio(tmp_path / f"a.{ending}")
    assert (found, wave.dtype, wave.shape) == (rate, np.float32, TONE.shape)
    np.testing.assert_allclose(wave, TONE * gains.mean(), atol=tolerance + 1e-7)


def test_load_mp3(tmp_path):
    soundfile.write(tmp_path / "a.mp3", TONE, 48000)
    wave, rate = load_audio(tmp_path / "a.mp3")
    assert rate == 48000
    np.testing.assert_allclose(wave[1000:4000], TONE[1000:4000], atol=0.02)


def test_load_m4a(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([TONE, TONE * 0.5]), format="fltp", layout="stereo")
        frame.sample_rate = 48000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    wave, rate = load_audio(tmp_path / "a.m4a")
    assert rate == 48000
    delay = int(np.argmax(np.correlate(wave, TONE, "valid"))) if len(wave) > len(TONE) else 0
    np.testing.assert_allclose(wave[delay + 1500 : delay + 3500], 0.75 * TONE[1500:3500], atol=0.06)


def _damage(path, kind):
    good = path.with_suffix(".good." + path.suffix[1:])
    soundfile.write(good, np.random.default_rng(0).normal(0, 0.1, 20000), 16000)
    whole = good.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if kind == "cut" else whole)


BAD = {
    "missing.wav": (lambda p: None, "no such file"),
    "folder.wav": (lambda p: p.mkdir(), "is a folder, expected an audio file"),
    "text.wav": (lambda p: p.write_text("this is a text file, not a recording"), "not an audio file"),
    "empty.wav": (lambda p: p.write_bytes(b""), "the file is empty"),
    "cut.flac": (lambda p: _damage(p, "cut"), "cut short"),
    "cut.wav": (lambda p: _damage(p, "cut"), "cut short"),
    "cut.mp3": (lambda p: _damage(p, "cut"), "cut short"),
    "cut.m4a": (lambda p: p.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(64)), "damaged or cut short"),
    "none.wav": (lambda p: soundfile.write(p, np.zeros(0), 16000), "holds 0 samples"),
    "nan.wav": (lambda p: soundfile.write(p, np.array([0, np.nan]), 16000, "FLOAT"), "sample 1 is NaN or infinite"),
    "inf.wav": (lambda p: soundfile.write(p, np.array([np.inf, 0]), 16000, "FLOAT"), "sample 0 is NaN or infinite"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_loaded_says_why(tmp_path, name):
    make, message = BAD[name]
    if name.endswith("m4a"):
        pytest.importorskip("av")
    make(tmp_path / name)
    with pytest.raises(MossError, match=message) as error:
        load_audio(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_m4a_without_pyav_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    with pytest.raises(MossError, match=r"pip install 'moss-jax\[m4a\]'"):
        load_audio(tmp_path / "a.m4a")


def test_a_wav_from_a_pipe_may_leave_its_size_open(tmp_path):
    save_audio(tmp_path / "a.wav", TONE, 16000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(data)
    assert load_audio(tmp_path / "a.wav")[0].shape == TONE.shape


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_save_and_load_again(tmp_path, name):
    save_audio(tmp_path / name, TONE * 3, 24000)
    wave, rate = load_audio(tmp_path / name)
    assert rate == 24000 and soundfile.info(tmp_path / name).subtype == "PCM_16"
    np.testing.assert_allclose(wave, np.clip(TONE * 3, -1, 1), atol=4e-5)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_save_writes_whole_or_not_at_all(tmp_path, monkeypatch):
    save_audio(tmp_path / "a.wav", TONE, 24000)
    before = (tmp_path / "a.wav").read_bytes()
    with pytest.raises(MossError, match="NaN or infinite"):
        save_audio(tmp_path / "a.wav", TONE * np.nan, 24000)
    with pytest.raises(MossError, match="cannot be written"):
        save_audio(tmp_path / "no_such_folder" / "a.wav", TONE, 24000)
    with pytest.raises(MossError, match=r"expected \.wav or \.flac"):
        save_audio(tmp_path / "a.txt", TONE, 24000)

    def full(*args, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(soundfile, "write", full)
    with pytest.raises(MossError, match="No space left on device"):
        save_audio(tmp_path / "a.wav", TONE[:10], 24000)
    assert (tmp_path / "a.wav").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def published_resample(wave, old, new, zeros=6, rolloff=0.99):
    """The formula as a loop over output samples, in float64."""
    divisor = np.gcd(old, new)
    old = old // divisor
    new = new // divisor
    base = rolloff * min(old, new)
    width = int(np.ceil(zeros * old / base))
    padded = np.concatenate([np.zeros(width), wave, np.zeros(width + old)])
    out = []
    for n in range(int(np.ceil(np.float32(new * len(wave) / old)))):
        block, phase = divmod(n, new)
        taps = np.arange(-width, width + old)
        t = np.clip(base * (taps / old - phase / new), -zeros, zeros)
        kernel = base / old * np.sinc(t) * np.cos(np.pi * t / zeros / 2) ** 2
        out.append(kernel @ padded[block * old : block * old + len(taps)])
    return np.array(out)


RATES = [(44100, 16000), (48000, 16000), (24000, 16000), (44100, 24000), (16000, 24000), (8000, 16000), (96000, 16000)]
UNUSUAL = [(8001, 16000), (22254, 16000), (44101, 24000), (47999, 16000), (655350, 16000)]


@pytest.mark.parametrize("rates", RATES)
@settings(max_examples=5, deadline=None)
@given(length=st.integers(0, 1500))
def test_resample_is_the_published_formula(rates, length):
    wave = np.random.default_rng(length).normal(0, 0.3, length).astype(np.float32)
    ours = resample(wave, *rates)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, published_resample(wave, *rates), atol=2e-6)


@pytest.mark.parametrize("rates", UNUSUAL)
def test_resample_is_the_published_formula_at_unusual_rates(rates):
    wave = np.random.default_rng(0).normal(0, 0.3, 200).astype(np.float32)
    np.testing.assert_allclose(resample(wave, *rates), published_resample(wave, *rates), atol=2e-6)


@pytest.mark.parametrize("rate", [1000, 8001, 22051, 44101, 47999, 65537, 655350, 767999, 768000])
@pytest.mark.parametrize("to_rate", [16000, 24000])
def test_a_tone_at_any_rate_keeps_its_frequency_and_level(rate, to_rate):
    wave = (0.5 * np.sin(2 * np.pi * 100 * np.arange(rate) / rate)).astype(np.float32)
    ours = resample(wave, rate, to_rate)
    expected = 0.5 * np.sin(2 * np.pi * 100 * np.arange(len(ours)) / to_rate)
    assert len(ours) == to_rate
    middle = slice(to_rate // 10, -to_rate // 10)
    np.testing.assert_allclose(ours[middle], expected[middle], atol=2e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("rate", [44101, 767999])
def test_unusual_rates_need_little_memory(rate):
    code = (
        "import re, resource, sys; import numpy as np, scipy.signal; from moss_jax.audio import resample\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32)); rate = int(sys.argv[1])\n"
        "for seconds in (1, 3): resample(np.zeros(seconds * rate, np.float32), rate, 16000)\n"
        "print((peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(rate)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400  # MiB


def test_a_jax_wave_with_an_unusual_ratio_of_rates_is_refused():
    with pytest.raises(MossError, match="expected a numpy wave"):
        resample(jax.numpy.zeros(1000), 44101, 16000)


def test_resample_under_jit_and_with_leading_axes():
    wave = np.random.default_rng(0).normal(0, 0.3, (2, 3, 1000)).astype(np.float32)
    ours = jax.jit(lambda x: resample(x, 44100, 16000))(wave)
    np.testing.assert_allclose(ours, resample(wave, 44100, 16000), atol=1e-6)
    np.testing.assert_allclose(ours[1, 2], resample(wave[1, 2], 44100, 16000), atol=1e-6)


def test_resample_keeps_the_length_quirk_and_refuses_odd_rates():
    assert len(resample(np.zeros(180697, np.float32), 44100, 16000)) == int(np.ceil(180697 * 160 / 441)) - 1
    assert resample(TONE, 16000, 16000) is TONE
    with pytest.raises(MossError, match="rates are positive"):
        resample(TONE, 0, 16000)


def test_segments():
    assert [len(part) for part in segments(np.zeros(25), 10)] == [10, 10, 5]
    assert segments(np.zeros(0), 10) == []


@pytest.mark.parametrize("name", ["prompt_en.wav", "reference_zh.wav", "reference_en_0.mp3", "reference_en.m4a"])
def test_real_recordings(recording, name):
    wave, rate = load_audio(recording(name))
    assert 2 < len(wave) / rate < 60 and 0.1 < np.abs(wave).max() <= 1

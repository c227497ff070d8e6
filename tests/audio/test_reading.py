"""What people's files look like: every container whole, truncated, joined, with wrong sizes, from pipes, too large."""

import io
import os
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.audio import load_audio, read_audio
from moss_jax.errors import MossError

RATE = 16000
NOISE = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
PCM = (NOISE * 32767).astype("<i2").tobytes()


def encoded(kind, subtype=None, wave=NOISE, rate=RATE):
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=kind, subtype=subtype)
    return out.getvalue()


def muxed(container, codec, wave=NOISE, rate=48000, options=None):
    """A file that PyAV writes; None where PyAV is not installed."""
    try:
        import av
    except ImportError:
        return None
    out = io.BytesIO()
    with av.open(out, "w", format=container, options=options or {}) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        form = av.Codec(codec, "w").audio_formats[0].name
        size = {"aac": 1024, "libopus": 960}[codec]
        resampler = av.AudioResampler(format=form, layout="mono", rate=rate, frame_size=size)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[None]), format="fltp", layout="mono")
        frame.sample_rate = RATE
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            file.mux(list(stream.encode(piece)))
    return out.getvalue()


def wav(size, riff=None, samples=PCM, behind=b""):
    """A 16-bit WAV file whose data chunk says that it has `size` bytes."""
    header = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, RATE, RATE * 2, 2, 16)
    riff = 36 + size if riff is None else riff
    return b"RIFF" + struct.pack("<I", riff) + header + b"data" + struct.pack("<I", size) + samples + behind


FILES = {
    "wav": encoded("WAV", "PCM_16"),
    "wav-24": encoded("WAVEX", "PCM_24"),
    "wav-float": encoded("WAV", "FLOAT"),
    "wav-ulaw": encoded("WAV", "ULAW"),
    "rf64": encoded("RF64", "PCM_16"),
    "w64": encoded("W64", "PCM_16"),
    "aiff": encoded("AIFF", "PCM_16"),
    "aifc": encoded("AIFF", "FLOAT"),
    "caf": encoded("CAF", "PCM_16"),
    "au": encoded("AU", "PCM_16"),
    "flac": encoded("FLAC", "PCM_16"),
    "mp3": encoded("MP3"),
    "vorbis": encoded("OGG", "VORBIS"),
    "opus": encoded("OGG", "OPUS"),
    "m4a": muxed("mp4", "aac"),
    "webm": muxed("webm", "libopus"),
    "webm-live": muxed("webm", "libopus", options={"live": "1"}),
    "mkv": muxed("matroska", "aac"),
}
# Without an index, and with clusters of unknown size: the cut must be inside a block, which 2/3 of the file is.
CHAINED = ("mp3", "vorbis", "opus")


def content(name):
    if FILES[name] is None:
        pytest.skip("PyAV is not installed")
    return FILES[name]


def refused(data, match=None):
    with pytest.raises(MossError, match=match) as error:
        load_audio(io.BytesIO(data))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_is_read_with_tags_around_it(name):
    data = content(name)
    wave, rate = load_audio(io.BytesIO(data))
    assert rate in (RATE, 48000) and abs(len(wave) / rate - 1) < 0.09 and wave.dtype == np.float32
    id3 = b"ID3\4\0\0\0\0\0\x10" + bytes(16)
    np.testing.assert_array_equal(load_audio(io.BytesIO(id3 + data))[0], wave)
    np.testing.assert_array_equal(load_audio(io.BytesIO(data + bytes(4096)))[0], wave)
    if name[:4] != "webm" and name != "mkv":
        np.testing.assert_array_equal(load_audio(io.BytesIO(data + b"TAG" + bytes(125)))[0], wave)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.999, 2 / 3, 0.4])
def test_a_truncated_file_is_an_error(name, share):
    data = content(name)
    refused(data[: int(len(data) * share)], "cut short")


@pytest.mark.parametrize("name", FILES)
def test_joined_files_are_read_whole_or_refused(name):
    data = content(name)
    if name in CHAINED:
        wave, _ = load_audio(io.BytesIO(data))
        both, _ = load_audio(io.BytesIO(data + data))
        np.testing.assert_array_equal(both, np.concatenate([wave, wave]))
    else:
        refused(data + data, "joined")
    refused(data + FILES["wav"], "joined|are not Ogg")


@pytest.mark.parametrize("name", CHAINED)
def test_joined_files_of_another_format_are_refused(name):
    kind = {"mp3": ("MP3", None), "vorbis": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS")}[name]
    refused(FILES[name] + encoded(*kind, rate=24000), "expected one format")


# Sizes of a stream that nobody could know at its start


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFF0000])
@pytest.mark.parametrize("riff", [0, 0xFFFFFFFF, 36])
def test_a_wav_of_unknown_size_is_read_to_its_end(size, riff):
    wave, _ = load_audio(io.BytesIO(wav(size, riff)))
    np.testing.assert_array_equal(wave, np.frombuffer(PCM, "<i2") / np.float32(32768))


@pytest.mark.parametrize("size", [0, 3200])
def test_a_joined_wav_of_unknown_size_is_refused(size):
    refused(wav(size) * 2, "joined|bytes follow")


@pytest.mark.parametrize("behind", [b"", b"LIST\4\0\0\0INFO", b"id3 \2\0\0\0ab"])
def test_an_empty_wav_holds_no_samples(behind):
    refused(wav(0, samples=b"", behind=behind), "holds 0 samples")


@pytest.mark.parametrize("size", [3200, len(PCM) - 800, 2])
def test_a_size_that_the_file_contradicts_is_an_error(size):
    refused(wav(size), rf"says {size} bytes of samples, but {len(PCM) - size} bytes follow")


@pytest.mark.parametrize("cut", [0, 1])
@pytest.mark.parametrize(
    "chunks",
    [
        b"LIST\x0a\0\0\0INFOISFT\0\0",
        b"id3 \x03\0\0\0abc\0bext\x02\0\0\0ab",
        b"LIST\xff\0\0\0INFOISFT",
        b"ID3\4 raw tag",
        b"APETAGEX" + bytes(24),
        bytes(5000),
    ],
)
def test_chunks_behind_the_samples_are_no_samples(chunks, cut):
    samples = PCM[: len(PCM) - cut]
    pad = bytes(len(samples) % 2)
    wave, _ = load_audio(io.BytesIO(wav(len(samples), samples=samples, behind=pad + chunks)))
    assert len(wave) == RATE - cut


def test_other_containers_of_unknown_size():
    rf64 = bytearray(FILES["rf64"])
    place = rf64.index(b"ds64")
    rf64[place + 8 : place + 32] = bytes(24)
    rf64[4:8] = b"\xff" * 4
    caf = bytearray(FILES["caf"])
    place = caf.index(b"data") + 4
    caf[place : place + 8] = b"\xff" * 8
    au = bytearray(FILES["au"])
    au[8:12] = b"\xff" * 4
    w64 = bytearray(FILES["w64"])
    place = w64.index(b"data\xf3\xac") + 16
    w64[place : place + 8] = bytes(8)
    aiff = bytearray(FILES["aiff"])
    place = aiff.index(b"SSND") + 4
    aiff[place : place + 4] = bytes(4)
    for data in (rf64, caf, au, w64, aiff):
        assert len(load_audio(io.BytesIO(data))[0]) == RATE, data[:4]


def flac_total(data, total):
    """The same FLAC file with another number of samples in its header."""
    field = int.from_bytes(data[21:26], "big")
    return data[:21] + (field >> 36 << 36 | total).to_bytes(5, "big") + data[26:]


@pytest.mark.parametrize("seconds", [0.05, 1, 5.3])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_flac_of_unknown_length_is_read_to_its_end(seconds, channels):
    count = int(seconds * RATE)
    wave = np.random.default_rng(1).normal(0, 0.1, (count, channels))
    data = encoded("FLAC", "PCM_16", wave)
    expected, _ = load_audio(io.BytesIO(data))
    found, _ = load_audio(io.BytesIO(flac_total(data, 0)))
    assert len(found) == count
    np.testing.assert_array_equal(found, expected)
    for cut in (1, 100, len(data) // 3):
        refused(flac_total(data, 0)[:-cut], "cut short")


def test_a_flac_header_that_lies():
    refused(flac_total(FILES["flac"], 2**36 - 1), "cut short")
    refused(flac_total(FILES["flac"], RATE - 1), f"says {RATE - 1} samples, but the file holds {RATE}")
    refused(flac_total(FILES["flac"], 2**36 - 1)[:43], "cut short")
    refused(flac_total(FILES["flac"], 0) * 2, "joined")


def vbr_mp3(loud_first):
    loud = np.random.default_rng(0).normal(0, 0.3, RATE * 4).astype(np.float32)
    quiet = np.zeros(RATE * 4, np.float32)
    return np.concatenate([loud, quiet] if loud_first else [quiet, loud])


@pytest.mark.parametrize("loud_first", [True, False])
def test_a_whole_mp3_of_varying_bit_rate_without_a_count_is_read(loud_first):
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format="mp3", options={"write_xing": "0", "id3v2_version": "0"}) as file:
        stream = file.add_stream("libmp3lame", rate=44100, layout="mono")
        stream.codec_context.qscale = True
        stream.codec_context.global_quality = 5 * 118
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=44100, frame_size=1152)
        frame = av.AudioFrame.from_ndarray(vbr_mp3(loud_first)[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            file.mux(list(stream.encode(piece)))
    data = out.getvalue()
    assert b"Xing" not in data and b"Info" not in data
    wave, rate = load_audio(io.BytesIO(data))
    assert abs(len(wave) / rate - 8) < 0.1
    first, second = np.array_split(wave, 2)
    assert (first.std() > second.std()) == loud_first
    both, _ = load_audio(io.BytesIO(data + data))
    assert abs(len(both) / rate - 16) < 0.2


def test_an_mp3_count_that_is_too_small_does_not_end_the_recording():
    data = bytearray(FILES["mp3"])
    place = max(data.find(b"Xing"), data.find(b"Info"))
    assert place > 0 and data[place + 7] & 1
    data[place + 8 : place + 12] = (3).to_bytes(4, "big")
    np.testing.assert_allclose(len(load_audio(io.BytesIO(data))[0]), RATE, atol=1152)
    data[place + 8 : place + 12] = (99999).to_bytes(4, "big")
    refused(bytes(data), "MP3 frames are missing")


def test_blocks_are_decoded_as_the_whole(tmp_path):
    long = np.random.default_rng(2).normal(0, 0.1, (40 * RATE, 2)).astype(np.float32)
    for kind, subtype in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)):
        data = encoded(kind, subtype, long)
        expected = soundfile.read(io.BytesIO(data), dtype="float32")[0].mean(1)
        np.testing.assert_allclose(load_audio(io.BytesIO(data))[0], expected, atol=1e-6, err_msg=subtype or kind)


# Where the bytes come from


def script(code, *arguments, **keywords):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, timeout=60, **keywords
    )


READ = "import sys; from moss_jax.audio import load_audio; wave, rate = load_audio(sys.argv[1]); print(len(wave), rate)"


@pytest.mark.parametrize("source", ["-", "/dev/stdin"])
@pytest.mark.parametrize("name", ["wav", "mp3", "m4a"])
def test_standard_input(source, name, tmp_path):
    data = content(name)
    wave, rate = load_audio(io.BytesIO(data))
    piped = script(READ, source, input=data)
    assert piped.stdout.split() == [str(len(wave)).encode(), str(rate).encode()], piped.stderr
    (tmp_path / "a").write_bytes(data)
    with (tmp_path / "a").open("rb") as file:
        assert script(READ, source, stdin=file).stdout == piped.stdout


@pytest.mark.parametrize("name", ["wav", "flac", "vorbis", "webm"])
def test_a_named_pipe_is_opened_once(name, tmp_path):
    data = content(name)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[data], daemon=True)
    writer.start()
    found, _ = load_audio(tmp_path / "pipe")
    writer.join(10)
    np.testing.assert_array_equal(found, load_audio(io.BytesIO(data))[0])


def test_file_objects_and_odd_names(tmp_path):
    expected, _ = load_audio(io.BytesIO(FILES["wav"]))
    for name in (b"caf\xe9.wav", b"question.raw", b"a b'\n.mp3"):
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as file:
            file.write(FILES["wav"])
        np.testing.assert_array_equal(load_audio(path)[0], expected)
        np.testing.assert_array_equal(load_audio(os.fsdecode(path))[0], expected)
        with open(path, "rb") as file:
            np.testing.assert_array_equal(load_audio(file)[0], expected)
            assert not file.closed
    with pytest.raises(MossError, match="open as text"):
        load_audio(io.StringIO("a"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, "cannot be read"),
        ("a\0b", "cannot be read"),
        ("", "no such file"),
        ("/dev/null", "neither a file nor"),
        ("/dev/zero", "neither a file nor"),
        (".", "is a folder"),
        ("a.wav/b", "no such file|cannot be read"),
    ],
)
def test_names_of_what_is_no_file(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(FILES["wav"])
    with pytest.raises(MossError, match=message) as error:
        load_audio(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"", b"RIFF", b"fLaC", b"OggS", b"\x1aE\xdf\xa3", b"ID3", b"\xff\xfb", b"\0" * 100])
def test_beginnings_of_files_are_refused(data):
    refused(data)


# Limits


def test_rates_outside_the_limits_are_refused():
    data = bytearray(wav(len(PCM)))
    for rate in (0, 1, 999, 768001, 2**31):
        data[24:28] = struct.pack("<I", rate)
        refused(bytes(data), "sample rate is|not an audio file")
    for rate in (1000, 768000):
        data[24:28] = struct.pack("<I", rate)
        assert load_audio(io.BytesIO(data))[1] == rate


@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "opus", "m4a", "webm"])
def test_the_limits_hold_while_decoding(name):
    data = content(name)
    with pytest.raises(MossError, match=r"exceeds the limit of .* MiB .*--max-audio-mib"):
        read_audio(io.BytesIO(data), max_bytes=2**15)
    with pytest.raises(MossError, match=r"longer than 0\.5 s"):
        read_audio(io.BytesIO(data), max_seconds=0.5)
    read_audio(io.BytesIO(data), max_bytes=2**19, max_seconds=2)


def test_all_channels_count_for_the_limit():
    wide = encoded("FLAC", "PCM_16", np.zeros((RATE, 8)))
    with pytest.raises(MossError, match="exceeds the limit"):
        read_audio(io.BytesIO(wide), max_bytes=RATE * 4 * 8 - 1)
    assert len(read_audio(io.BytesIO(wide), max_bytes=RATE * 4 * 8).wave) == RATE


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux does")
def test_many_channels_need_the_memory_of_one(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.zeros((192000 * 30, 8), np.float32), 192000, subtype="PCM_16")
    code = (
        "import re, sys; import soundfile, scipy.signal; from moss_jax.audio import load_audio\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "before = peak(); load_audio(sys.argv[1]); print((peak() - before) / 1024)"
    )
    mib = float(script(code, tmp_path / "a.flac").stdout)
    assert mib < 80  # the mono wave has 22 MiB, all channels have 176


def test_an_m4a_with_bad_bytes_in_a_tag(tmp_path):
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        file.metadata["title"] = "a title that is damaged"
        stream = file.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(NOISE[None], format="fltp", layout="mono")
        frame.sample_rate = 48000
        file.mux(list(stream.encode(frame)) + list(stream.encode(None)))
    data = out.getvalue()
    expected, _ = load_audio(io.BytesIO(data))
    assert data.count(b"title that") == 1
    np.testing.assert_array_equal(load_audio(io.BytesIO(data.replace(b"title that", b"t\xff\xfele that")))[0], expected)


@pytest.mark.parametrize("duration", [0, 2**32 - 1])
def test_durations_in_an_m4a_are_not_believed(duration):
    data = bytearray(content("m4a"))
    expected, _ = load_audio(io.BytesIO(data))
    for box, offset in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):
        place = data.index(box)
        data[place + offset : place + offset + 4] = duration.to_bytes(4, "big")
    found, _ = load_audio(io.BytesIO(data))
    assert abs(len(found) - len(expected)) <= 2048


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_damaged_files_give_samples_or_one_line(name, data):
    whole = bytearray(content(name))
    for _ in range(data.draw(st.integers(1, 4))):
        near = data.draw(st.integers(0, min(200, len(whole) - 1)) | st.integers(0, len(whole) - 1))
        whole[near] = data.draw(st.integers(0, 255))
    try:
        wave = read_audio(io.BytesIO(whole), max_bytes=2**24).wave
    except MossError as error:
        assert "\n" not in str(error)
    else:
        assert np.isfinite(wave).all() and len(wave)


def test_an_mp3_header_without_frames_behind_it_holds_no_samples():
    data = FILES["mp3"]
    refused(data[: data.index(data[:2], 4)], "holds 0 samples|MP3 frames are missing")


# Channels


def stereo(left, right):
    return encoded("WAV", "FLOAT", np.stack([left, right], 1))


@pytest.mark.parametrize(("left", "right", "used"), [(1, -1, 1), (-0.9, 1, 2), (1, -0.95, 1)])
def test_channels_that_cancel_are_replaced_by_the_loudest(left, right, used):
    read = read_audio(io.BytesIO(stereo(left * NOISE, right * NOISE)), name="q.wav")
    (notice,) = read.notices
    assert notice.startswith("q.wav: its 2 channels cancel") and f"channel {used} is used" in notice
    np.testing.assert_allclose(read.wave, (left, right)[used - 1] * NOISE, atol=1e-6)


@pytest.mark.parametrize(("left", "right"), [(1, 1), (1, 0), (0, 1), (1, -0.3), (0, 0)])
def test_channels_that_do_not_cancel_are_averaged(left, right):
    read = read_audio(io.BytesIO(stereo(left * NOISE, right * NOISE)))
    assert read.notices == ()
    np.testing.assert_allclose(read.wave, (left + right) / 2 * NOISE, atol=1e-6)


def test_a_constant_offset_does_not_hide_that_channels_cancel():
    read = read_audio(io.BytesIO(stereo(NOISE + 0.3, -NOISE + 0.3)))
    assert len(read.notices) == 1 and read.wave.std() > 0.09


@pytest.mark.parametrize(("factor", "divisor"), [(30000, 32768), (2**23, 2**23), (2**31, 2**31)])
def test_a_float_file_of_another_scale_is_an_error(factor, divisor):
    wave = NOISE / np.abs(NOISE).max() * factor
    refused(encoded("WAV", "FLOAT", wave), f"samples reach .*divide them by {divisor} ")

"""`moss-jax tokenize --format decoder`: the data set, resuming, the order of batches, bad input."""

import json
import pickle
import shutil

import numpy as np
import pytest
import soundfile

from moss_jax.audio import load_audio, resample
from moss_jax.checkpoint.system_folder import SystemFolder
from moss_jax.cli import main
from moss_jax.data import Mixture, decoder_data
from moss_jax.data.decoder_batches import SILENCE, DecoderBatches, FlowRows, VocoderRows
from moss_jax.data.decoder_data import DecoderDataRequest, DecoderDataset, build_decoder_data, estimate_f0
from moss_jax.dialogue.voice import log_mel
from moss_jax.errors import MossError
from moss_jax.speech_decoder.component import SPEECH_DECODER
from moss_jax.speech_tokenizer.encode import SpeechTokenizer

pytestmark = pytest.mark.slow

pytest.importorskip("librosa")
SECONDS = (0.9, 1.3, 0.6, 1.1)


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoken") / "system"
    assert main(["init-random", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    lines = []
    for number, seconds in enumerate(SECONDS):
        time = np.arange(int(seconds * 22050)) / 22050
        wave = 0.3 * np.sin(2 * np.pi * (110 + 40 * number) * time) + 0.01 * random.normal(size=len(time))
        soundfile.write(folder / f"{number}.wav", wave, 22050)
        lines.append({"audio": f"{number}.wav", "text": "la"})
    lines[3] = {"turns": [{"role": "user", "audio": "0.wav"}, {"role": "assistant", "audio": "3.wav"}]}
    lines.append({"turns": [{"role": "user", "audio": "0.wav"}, {"role": "assistant", "text": "no"}]})
    (folder / "voice.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def data(system, corpus):
    out = corpus / "data"
    command = ["tokenize", str(corpus / "voice.jsonl"), "--model", str(system), "--format", "decoder", "-o", str(out)]
    assert main([*command, "--shard-documents", "2"]) == 0
    return out


@pytest.fixture(scope="module")
def config(system):
    return SystemFolder(system).config(SPEECH_DECODER)


def test_the_data_set(data, corpus, system, config):
    found = DecoderDataset(data, config, codes=True)
    assert len(found) == 4 and len(list(data.glob("shard-*"))) == 3 and not data.with_name("data.part").exists()
    tokenizer = SpeechTokenizer.load(system / "speech_tokenizer")
    for index, seconds in enumerate(SECONDS):
        wave, rate = load_audio(corpus / f"{index}.wav")
        count = int(found.counts[index])
        assert count == 4 * int(np.ceil(seconds * 12.5))
        piece = found.piece(index, 0, count, "codes", "mel", "wave", "f0", "embedding")
        at_decoder = resample(wave, rate, 24000)
        np.testing.assert_allclose(piece["wave"][: len(at_decoder)], at_decoder, atol=1e-4)
        np.testing.assert_array_equal(piece["codes"], tokenizer.encode([resample(wave, rate, 16000)])[0][: count // 4])
        np.testing.assert_allclose(piece["mel"], log_mel(piece["wave"], config), atol=1e-5)
        assert np.median(np.abs(piece["f0"][5:-8] - (110 + 40 * index))) < 3
        assert piece["embedding"].shape == (192,) and np.abs(piece["embedding"]).max() > 0
    part = found.piece(1, 8, 12, "mel", "wave", "codes")
    whole = found.piece(1, 0, 32, "mel", "wave", "codes")
    np.testing.assert_array_equal(part["mel"], whole["mel"][8:20])
    np.testing.assert_array_equal(part["wave"], whole["wave"][8 * 480 : 20 * 480])
    np.testing.assert_array_equal(part["codes"], whole["codes"][2:5])
    mels = np.concatenate([found.piece(i, 0, int(n), "mel")["mel"] for i, n in enumerate(found.counts)])
    np.testing.assert_allclose(found.about["mel_mean"], mels.mean(0), atol=1e-4)
    np.testing.assert_allclose(found.about["mel_deviation"], mels.std(), rtol=1e-4)


def test_frames_of_f0_have_the_times_of_mel_frames():
    """A tone that stops at sample 9600: the last whole frame with it is centred before that."""
    time = np.arange(14400) / 24000
    wave = np.where(time < 0.4, 0.3 * np.sin(2 * np.pi * 200 * time), 0).astype(np.float32)
    f0 = estimate_f0(wave, 24000, 480)
    assert len(f0) == 30 and abs(f0[10] - 200) < 3 and (f0[24:] == 0).all()


def test_an_interrupted_build_is_resumed(system, corpus, data, monkeypatch, capsys):
    out = corpus / "again"
    calls = []
    request = DecoderDataRequest(corpus / "voice.jsonl", system, out, 2)
    make = decoder_data._DecoderDataBuild.make_shard

    def stopping(self, index, pool):
        calls.append(index)
        if len(calls) == 3:
            raise KeyboardInterrupt
        make(self, index, pool)

    monkeypatch.setattr(decoder_data._DecoderDataBuild, "make_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_decoder_data(request)
    assert not out.exists() and (corpus / "again.part" / "shard-00001").is_dir()
    assert build_decoder_data(request) == build_decoder_data(
        DecoderDataRequest(corpus / "voice.jsonl", system, data, 2)
    )
    assert calls == [0, 1, 2, 2]
    for path in data.rglob("*.npy"):
        np.testing.assert_array_equal(np.load(path), np.load(out / path.relative_to(data)))
    with pytest.raises(MossError, match="made from another manifest, model or settings"):
        build_decoder_data(DecoderDataRequest(corpus / "voice.jsonl", system, out, 3))


def test_the_order_depends_on_seed_and_step_alone(data, config):
    mixture = Mixture((("voice", str(data), 1.0),), seed=3)

    def batches(**options):
        return DecoderBatches(mixture, config, batch_size=4, **{"codes": 10, **options})

    whole = batches()
    first = [next(whole) for _ in range(3)]
    assert {int(count) for count in first[0]["count"]} == {8, 10}  # an epoch of all four, the long ones cut
    for name, shape in (("codes", (10,)), ("mel", (40, 80)), ("embedding", (192,))):
        assert first[0][name].shape == (4, *shape)
    state = whole.get_state()
    then = next(whole)
    again = batches(workers=0)
    again.set_state(state)
    halves = [batches(process_index=i, process_count=2) for i in range(2)]
    for half in halves:
        half.skip_to(3)
    parts = [next(half) for half in halves]
    for name, value in next(again).items():
        np.testing.assert_array_equal(value, then[name])
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)
    with pytest.raises(MossError, match="other data"):
        batches(codes=12).set_state(state)
    cuts = VocoderRows(data, config, 0, 0, frames=48)
    row = cuts[5]
    same = pickle.loads(pickle.dumps(cuts))[5]
    assert row["wave"].shape == (48 * 480,) and row["f0"].shape == (48,)
    for name in row:
        np.testing.assert_array_equal(row[name], same[name])
    short = next(cuts[i] for i in range(50) if cuts[i]["mel"][-1, 0] == np.float32(SILENCE))
    assert (short["wave"][-480:] == 0).all() and short["f0"][-1] == 0


def test_without_a_speech_tokenizer_it_serves_the_vocoder(system, corpus, config, tmp_path):
    bare = tmp_path / "system"
    bare.mkdir()
    shutil.copy(system / "system.json", bare)
    (tmp_path / "one.jsonl").write_text(json.dumps({"audio": "2.wav"}))
    shutil.copy(corpus / "2.wav", tmp_path)
    about = build_decoder_data(DecoderDataRequest(tmp_path / "one.jsonl", bare, tmp_path / "data"))
    assert about["codes"] is None and about["embedding"] is None
    assert VocoderRows(tmp_path / "data", config, 0, 0, frames=8)[0]["mel"].shape == (8, 80)
    with pytest.raises(MossError, match="without a speech tokenizer"):
        FlowRows(tmp_path / "data", config, 0, 0, codes=8)


def test_bad_lines_are_reported(system, corpus, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    (tmp_path / "bad.jsonl").write_text('{"audio": "bad.wav"}\n{"text": "no sound"}\n{"codes": [1]}\n')
    with pytest.raises(MossError) as error:
        build_decoder_data(DecoderDataRequest(tmp_path / "bad.jsonl", system, tmp_path / "data"))
    message = str(error.value)
    assert "line 1:" in message and "lines 2 to 3: has no recording" in message


def test_shards_after_one_with_a_bad_line_are_complete(system, corpus, tmp_path):
    """When the recording is repaired, the same command makes the missing shard and uses the others."""
    lines = [{"audio": f"{number}.wav"} for number in (2, 0, 2)]
    (tmp_path / "voice.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in (0, 2):
        shutil.copy(corpus / f"{number}.wav", tmp_path)
    request = DecoderDataRequest(tmp_path / "voice.jsonl", system, tmp_path / "data", shard_documents=1)
    whole = (tmp_path / "0.wav").read_bytes()
    (tmp_path / "0.wav").write_bytes(b"RIFF")
    with pytest.raises(MossError, match="line 2:"):
        build_decoder_data(request)
    (tmp_path / "0.wav").write_bytes(whole)
    assert build_decoder_data(request)["documents"] == 3

"""`moss-jax tokenize` on a tiny system: the same data set at once, in shares, after a kill and on several devices."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from moss_jax.audio import load_audio, resample
from moss_jax.checkpoint.system_folder import SystemFolder
from moss_jax.cli import main
from moss_jax.data import Mixture, open_batches
from moss_jax.data.store import Examples, shard_name
from moss_jax.data.tokenize import TokenizeRequest, tokenize
from moss_jax.errors import MossError
from moss_jax.speech_lm.component import SPEECH_LM
from moss_jax.speech_tokenizer.encode import SpeechTokenizer
from moss_jax.text.tokenizer import TextTokenizer

ROOT = Path(__file__).resolve().parents[2]
RECORDINGS = 10


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenize") / "system"
    assert main(["init-random", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of recordings of 4 to 7 s at two rates, and a manifest with texts and word times."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    with (folder / "speech.jsonl").open("w") as file, tarfile.open(folder / "part.tar", "w") as tar:
        for number in range(RECORDINGS):
            count = int(random.integers(12, 15))
            wave = random.normal(0, 0.1, count * 8000)
            name = f"{number}.{'flac' if number % 2 else 'wav'}"
            rate = 16000 if number % 3 else 24000
            buffer = io.BytesIO()
            soundfile.write(buffer, wave, rate, format=name[2:].upper())
            words = [f"w{i}" for i in range(count)]
            line = {
                "audio": name,
                "text": " ".join(words) + ".",
                "words": [[word, i * 8000 / rate, (i + 0.8) * 8000 / rate] for i, word in enumerate(words)],
            }
            if number == 4:
                entry = tarfile.TarInfo(name)
                entry.size = len(buffer.getvalue())
                buffer.seek(0)
                tar.addfile(entry, buffer)
                line["shard"] = "part.tar"
            else:
                (folder / name).write_bytes(buffer.getvalue())
            file.write(json.dumps(line) + "\n")
    return folder


def command(corpus, system, out, *more, format="interleaved", manifest="speech.jsonl"):
    return ["tokenize", str(corpus / manifest), "--model", str(system), "--format", format, "-o", str(out), *more]


def config_of(system):
    return SystemFolder(system).config(SPEECH_LM)


def read_text_tokenizer(system):
    return TextTokenizer.from_file(SystemFolder(system).text_tokenizer_path)


def content(folder):
    """Names and bytes of a data set; what is written into protocol buffers has no fixed order of fields."""
    examples = Examples(folder)
    return [
        (e.name, e.grid.tolist(), e.loss_weights.tolist()) for e in (examples[i] for i in range(len(examples)))
    ], examples.about


@pytest.fixture(scope="module")
def whole(corpus, system, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "data"
    assert main(command(corpus, system, out, "--variants", "2", "--shard-documents", "4")) == 0
    return out


def codes_of(system, corpus, number):
    name = f"{number}.{'flac' if number % 2 else 'wav'}"
    if number == 4:
        with tarfile.open(corpus / "part.tar") as tar:
            wave, rate = soundfile.read(io.BytesIO(tar.extractfile(name).read()), dtype="float32")
    else:
        wave, rate = load_audio(corpus / name)
    return SpeechTokenizer.load(system / "speech_tokenizer").encode([resample(wave, rate, 16000)])[0]


def test_the_data_set(corpus, system, whole, capsys):
    config = config_of(system)
    examples = Examples(whole, config_of(system))
    assert sorted(path.name for path in whole.iterdir()) == [
        "dataset_info.json",
        *(f"examples-train.array_record-0000{i}-of-00003" for i in range(3)),
        "features.json",
        "lengths.npy",
        "source.json",
    ]
    assert len(examples) == 2 * RECORDINGS and examples.lengths.dtype == np.int32
    for number in range(2 * RECORDINGS):
        example = examples[number].check()
        assert len(example.grid) == examples.lengths[number]
        assert example.name == str(number // 2 + 1) + ("/1" if number % 2 else "")
        spoken = example.grid[:, 0] == config.modality_pad_id
        codes = example.grid[spoken, 1]
        inside = codes_of(system, corpus, number // 2)
        kept = [code for code in codes if code != config.eosp_id]
        text = read_text_tokenizer(system).decode(example.grid[~spoken, 0])
        # What is spoken and what is written are complements: stretches of codes of the recording, and the other words.
        assert (len(kept) < len(inside)) == ("w" in text) and kept + text.split()
        joined = " ".join(map(str, inside))
        at = 0
        for piece in " ".join(map(str, codes)).split(str(config.eosp_id)):
            at = joined.index(piece.strip(), at)
        assert "<" not in text
    about = examples.about
    assert about["rows"] == examples.lengths.sum() and about["kind"] == "interleaved"
    scored = sum(examples[i].loss_weights.sum(0) for i in range(len(examples)))
    assert [about["text_targets"], about["audio_targets"]] == scored.tolist()
    assert about["text_targets"] + about["audio_targets"] == about["rows"] - len(examples)
    # The same command again finds it done; other settings do not overwrite it.
    assert main(command(corpus, system, whole, "--variants", "2", "--shard-documents", "4")) == 0
    assert f"{whole}: 20 examples, {about['rows']} rows, " in capsys.readouterr().out
    assert main(command(corpus, system, whole, "--variants", "1", "--shard-documents", "4")) == 2
    assert "already exists, made from another manifest, model or settings" in capsys.readouterr().err


def test_tensorflow_datasets_reads_it(whole):
    """Without TensorFlow, and without us."""
    source = tfds.builder_from_directory(whole).as_data_source("train")
    assert len(source) == 2 * RECORDINGS and set(source[0]) == {"name", "grid", "loss_weights"}
    assert (source[7]["grid"] == Examples(whole)[7].grid).all()
    assert "tensorflow" not in sys.modules


def test_killed_and_run_again(corpus, system, whole, tmp_path):
    """SIGKILL as soon as codes are on disk, twice; what was encoded is not encoded again."""
    out = tmp_path / "data"
    arguments = command(corpus, system, out, "--variants", "2", "--shard-documents", "4")
    slow = (
        "import sys, time\n"
        "import moss_jax.data.build as build\n"
        "from moss_jax.speech_tokenizer.encode import SpeechTokenizer\n"
        "build.GROUP_DOCUMENTS = 2\n"
        "encode = SpeechTokenizer.encode\n"
        "calls = []\n"
        "def encode_once(*arguments):\n"  # the second group waits: the codes of the first are on disk then
        "    calls.append(arguments)\n"
        "    if len(calls) > 1:\n        time.sleep(60)\n"
        "    return encode(*arguments)\n"
        "SpeechTokenizer.encode = encode_once\n"
        "from moss_jax.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    journals = set()
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", slow, *arguments], env=environment)
        end = time.monotonic() + 120
        while not (found := set(out.with_name("data.part").rglob("*.npz"))) > journals and time.monotonic() < end:
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
        child.wait()
        journals = found
    assert len(journals) == 2 and not out.exists()
    encoded = []
    original = SpeechTokenizer.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            SpeechTokenizer, "encode", lambda self, waves: encoded.append(len(waves)) or original(self, waves)
        )
        assert main(arguments) == 0
    assert sum(encoded) == RECORDINGS - 4
    assert content(out) == content(whole) and not out.with_name("data.part").exists()


def test_processes_share_the_work(corpus, system, whole, tmp_path):
    lines = []
    for index in (1, 0):  # process 0 comes last: it would wait
        request = TokenizeRequest(
            corpus / "speech.jsonl",
            system,
            "interleaved",
            tmp_path / "data",
            variants=2,
            shard_documents=4,
            process_index=index,
            process_count=2,
        )
        about = tokenize(request, lines.append)
        assert (about is None) == (index == 1)
    assert re.match(r"4 of 4 documents, 0\.0\d h of audio at [\d.]+ x real time", lines[0])
    assert content(tmp_path / "data") == content(whole)


def test_on_several_devices(corpus, system, whole, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=3",
    }
    code = (
        "import sys, jax; assert jax.local_device_count() == 3\n"
        "import moss_jax.speech_tokenizer.encode as e; old = e.encode_padded\n"
        "def call(config, params, waves, lengths):\n"
        "    assert len(waves.sharding.device_set) == 3 and len(waves) % 3 == 0\n"
        "    return old(config, params, waves, lengths)\n"
        "e.encode_padded = call\nfrom moss_jax.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    arguments = command(corpus, system, tmp_path / "data", "--variants", "2", "--shard-documents", "4")
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "data") == content(whole)


def test_every_format_becomes_batches(corpus, system, tmp_path):
    config = config_of(system)
    (corpus / "text.jsonl").write_text("".join(json.dumps({"text": f"Sentence {i}."}) + "\n" for i in range(5)))
    turns = [
        {"role": "user", "audio": "0.wav"},
        {"role": "assistant", "codes": [1, 2, 255]},
        {"role": "user", "text": "Why?"},
        {"role": "assistant", "text": "So."},
    ]
    (corpus / "chat.jsonl").write_text(json.dumps({"turns": turns}) + "\n")
    manifests = {"text": "text.jsonl", "chat": "chat.jsonl"}
    formats = ("text", "speech", "continuation", "asr", "tts", "chat")
    for format in formats:
        assert (
            main(
                command(
                    corpus, system, tmp_path / format, format=format, manifest=manifests.get(format, "speech.jsonl")
                )
            )
            == 0
        )
    mixture = Mixture(tuple((format, str(tmp_path / format), 1.0) for format in formats))
    batch = next(open_batches(mixture, config, context=256, batch_size=12))
    assert set(batch["source"][:, 0]) == set(range(6))
    text, audio = ((batch["loss_weights"][..., channel] > 0).any(1) for channel in (0, 1))
    by_source = {formats[s]: (t, a) for s, t, a in zip(batch["source"][:, 0], text, audio, strict=True)}
    assert by_source["text"] == (True, False) and by_source["chat"] == (True, True)
    assert by_source["asr"] == (True, False) and by_source["tts"][1]


def test_text_needs_no_codec(corpus, system, tmp_path):
    bare = Path(shutil.copytree(system, tmp_path / "bare"))
    shutil.rmtree(bare / "speech_tokenizer")
    (corpus / "words.jsonl").write_text('{"text": "One."}\n{"text": "Two.", "audio": "0.wav"}\n')
    arguments = command(corpus, bare, tmp_path / "data", format="text", manifest="words.jsonl")
    assert main(arguments) == 0
    assert len(Examples(tmp_path / "data")) == 2
    with pytest.raises(MossError, match=r"has no speech_tokenizer/config.json"):
        tokenize(TokenizeRequest(corpus / "speech.jsonl", bare, "asr", tmp_path / "other"))


def test_recordings_that_cannot_be_read_are_all_listed_and_the_rest_is_kept(corpus, system, tmp_path, capsys):
    folder = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    good = {name: (folder / name).read_bytes() for name in ("1.flac", "8.wav")}
    (folder / "1.flac").write_text("no sound")
    (folder / "8.wav").write_bytes(good["8.wav"][:1000])
    lines = (folder / "speech.jsonl").read_text().splitlines()
    late = json.loads(lines[5])
    late["words"][-1][2] += 100
    (folder / "speech.jsonl").write_text("\n".join([*lines[:5], json.dumps(late), *lines[6:]]) + "\n")
    out = tmp_path / "data"
    assert main(command(folder, system, out, "--shard-documents", "4")) == 2
    first, *entries = capsys.readouterr().err.splitlines()
    assert first.endswith("3 bad lines of 10") and not out.exists()
    assert [line.split(":")[0].strip() for line in entries] == ["line 2", "line 6", "line 9"]
    assert "1.flac: not an audio file" in entries[0] and "8.wav: cut short" in entries[2]
    assert "the last one ends at" in entries[1]
    for name, data in good.items():
        (folder / name).write_bytes(data)
    (folder / "speech.jsonl").write_text("\n".join(lines) + "\n")
    encoded = []
    original = SpeechTokenizer.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeechTokenizer, "encode", lambda s, waves: encoded.append(len(waves)) or original(s, waves))
        assert main(command(folder, system, out, "--shard-documents", "4")) == 0
    assert sum(encoded) == 3
    clean = tmp_path / "clean"
    assert main(command(corpus, system, clean, "--shard-documents", "4")) == 0
    assert content(out)[0] == content(clean)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--format", "music"], "format 'music': expected one of text, speech"),
        (["--variants", "0"], "variants is 0, expected at least 1"),
        (["--format", "asr", "--variants", "2"], "documents of the format asr have one variant only"),
        (["--system", "x"], "the format interleaved has no system turn"),
        (["--format", "asr", "--aligner", "x"], "the format asr needs no word times"),
        (["--process", "2"], "--process is '2', expected I/N such as 0/4"),
        (["--process", "2/2"], "process_index is 2, expected 0 to 1"),
        (["--seed", "-1"], "seed is -1"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_requests(corpus, system, tmp_path, capsys, change, message):
    assert main([*command(corpus, system, tmp_path / "data"), *change]) == 2
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_folders_that_exist_already(corpus, system, tmp_path, capsys):
    arguments = command(corpus, system, tmp_path / "data", format="text")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("do not lose")
    assert main(arguments) == 2 and "already exists and is not a data set" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data.part").mkdir()
    (tmp_path / "data.part" / "settings.json").write_text("{}")
    assert main(arguments) == 2 and "was started with another model or other settings" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--system", "Be brief."]])
def test_shards_with_another_default_system_turn_are_not_mixed(system, tmp_path, capsys, monkeypatch, flags):
    """A set that was begun by a version with other default prompts."""
    (tmp_path / "chats.jsonl").write_text(
        '{"turns": [{"role": "user", "text": "A"}, {"role": "assistant", "text": "B"}]}\n'
    )
    line = command(tmp_path, system, tmp_path / "data", *flags, format="chat", manifest="chats.jsonl")

    def interrupted(*_):
        raise MossError("cut")

    monkeypatch.setattr("moss_jax.data.tokenize._ExamplesBuild.make_shard", interrupted)
    assert main(line) == 2
    monkeypatch.undo()
    (settings_file,) = (tmp_path / "data.part").glob("*.json")
    about = json.loads(settings_file.read_text())
    assert ("default_system" in about["settings"]) is not bool(flags)
    about["settings"].pop("default_system", None)
    settings_file.write_text(json.dumps(about))
    capsys.readouterr()
    assert main(line) == (0 if flags else 2)
    assert flags or "was started with another model or other settings" in capsys.readouterr().err


def test_vocabularies_that_do_not_match(corpus, system, tmp_path, capsys):
    """Of the manifest's codes, and of the speech tokenizer."""
    (corpus / "codes.jsonl").write_text('{"codes": [1, 255]}\n{"codes": [256]}\n')
    arguments = command(corpus, system, tmp_path / "data", format="speech", manifest="codes.jsonl")
    assert main(arguments) == 2
    assert "line 2: codes: 256 is not a code of this model, expected 0 to 255" in capsys.readouterr().err
    damaged = Path(shutil.copytree(system, tmp_path / "damaged"))
    path = damaged / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eosp_id": 200}))
    assert main(command(corpus, damaged, tmp_path / "data", format="speech")) == 2
    assert "the language model has 200, the speech tokenizer has 256" in capsys.readouterr().err


def test_a_full_disk(corpus, system, tmp_path):
    """No data set appears; with more space the same command resumes. A limit on file sizes simulates a full disk."""
    (corpus / "long.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 50}) + "\n" for i in range(300)))
    arguments = command(corpus, system, tmp_path / "data", format="text", manifest="long.jsonl")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from moss_jax.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MOSS_JAX_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "data").exists()
    assert re.fullmatch(r"moss-jax tokenize: .*shard-00000: cannot be written \(File too large\).*\n", done.stderr)
    assert main(arguments) == 0 and len(Examples(tmp_path / "data")) == 300


def test_word_times_by_alignment(corpus, system, checkpoint, tmp_path, capsys):
    lines = [json.loads(line) for line in (corpus / "speech.jsonl").read_text().splitlines()[:3]]
    for line in lines:
        del line["words"]
    (corpus / "bare.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = command(corpus, system, tmp_path / "data", manifest="bare.jsonl")
    assert main(arguments) == 2 and "lines 1 to 3: has no words (their times)" in capsys.readouterr().err
    assert main([*arguments, "--aligner", str(checkpoint)]) == 0
    config = config_of(system)
    examples = Examples(tmp_path / "data")
    for number, line in enumerate(lines):
        spoken = examples[number].grid[:, 0] == config.modality_pad_id
        text = read_text_tokenizer(system).decode(examples[number].grid[~spoken, 0])
        spoken_words = [word for word in line["text"].split() if word not in text.split()]
        assert set(text.split()) <= set(line["text"].split()) and bool(spoken_words) == bool(spoken.any())


def test_interrupted_while_the_data_set_is_completed(corpus, system, whole, tmp_path):
    """Half of the shards have their final names already, and there is no description."""
    arguments = command(corpus, system, tmp_path / "data", "--variants", "2", "--shard-documents", "4")

    def half_way(folder, shards, known, about):
        os.replace(shards[1], folder / shard_name(1, len(shards)))
        raise KeyboardInterrupt

    def broken(self):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moss_jax.data.tokenize.seal", half_way)
        assert main(arguments) == 130 and not (tmp_path / "data").exists()
        patch.undo()
        patch.setattr(SpeechTokenizer, "encode", None)  # nothing is left to encode
        with pytest.MonkeyPatch.context() as late:
            late.setattr("moss_jax.data.build.DatasetBuild.publish", broken)
            assert main(arguments) == 130 and (tmp_path / "data.part" / "source.json").exists()
        (tmp_path / "data.part" / "shard-00001.json").unlink()  # it was about to clear up
        assert main(arguments) == 0
    assert content(tmp_path / "data") == content(whole)


@pytest.mark.parametrize("format", ["speech", "decoder"])
def test_recordings_without_speech_are_listed_by_line(system, tmp_path, capsys, format):
    """Beside them a FLAC file whose header does not know its length, which is read."""
    noise = np.random.default_rng(0).normal(0, 0.1, 16000)
    soundfile.write(tmp_path / "silence.wav", np.zeros(16000), 16000)
    soundfile.write(tmp_path / "one.wav", np.array([0.1]), 16000)
    soundfile.write(tmp_path / "quiet.wav", noise * 1e-4, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "open.flac", noise, 16000)
    data = bytearray((tmp_path / "open.flac").read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    (tmp_path / "open.flac").write_bytes(data)
    names = ["open.flac", "silence.wav", "one.wav", "quiet.wav"]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"audio": name}) + "\n" for name in names))
    assert main(command(tmp_path, system, tmp_path / "data", format=format, manifest="m.jsonl")) == 2
    error = capsys.readouterr().err
    for line, message in ((2, "no speech found"), (3, "too short to hold speech"), (4, "no speech found")):
        assert f"line {line}: {tmp_path / names[line - 1]}: " in error and message in error
    assert "line 1" not in error
    (tmp_path / "good.jsonl").write_text(json.dumps({"audio": "open.flac"}) + "\n")
    assert main(command(tmp_path, system, tmp_path / "data2", format=format, manifest="good.jsonl")) == 0

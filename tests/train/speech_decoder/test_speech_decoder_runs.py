"""Runs of flow and vocoder through the loop: resumed bit by bit, evaluated, exported, and what an export then says."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from dev.reference.stream import reference_stream
from moss_jax.checkpoint.system_folder import SystemFolder
from moss_jax.data import Mixture
from moss_jax.data.decoder_data import DECODER_DATA_FORMAT, SOURCE_FILE
from moss_jax.errors import MossError
from moss_jax.speech_decoder import config as decoder_config
from moss_jax.speech_decoder.component import SPEECH_DECODER
from moss_jax.speech_decoder.decoder import SpeechDecoder
from moss_jax.speech_decoder.flow import config as flow_config
from moss_jax.speech_decoder.voice import Voice
from moss_jax.train import loop
from moss_jax.train.export import export_checkpoint
from moss_jax.train.optimizer import OptimizerConfig
from moss_jax.train.run_file import load_run, override, read_run
from moss_jax.train.speech_decoder.discriminators import DiscriminatorConfig
from moss_jax.train.speech_decoder.flow import FlowObjective
from moss_jax.train.speech_decoder.run import FlowRun, VocoderRun
from moss_jax.train.speech_decoder.vocoder import VocoderObjective
from tests.train import tiny
from tests.train.speech_decoder.test_vocoder_objective import CONFIG as VOCODER

MODEL = decoder_config.SpeechDecoderConfig(
    flow=replace(flow_config.TINY, speaker_size=1, mel_mean=-5.0, mel_std=2.0),
    vocoder=replace(VOCODER, mel_bins=8),
    speaker=None,
    chunks=(),
)
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, schedule="constant", warmup_steps=2, weight_decay=0.0)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Every run here compiles the same few programs: once is enough."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight recordings, as `moss-jax tokenize --format decoder` leaves them."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    counts = random.integers(5, 12, 8).astype(np.int32) * 4
    frames = int(counts.sum())
    table = random.normal(-5, 2, (90, 8))
    codes = random.integers(0, 90, frames // 4).astype(np.int32)
    shard = folder / "shard-00000"
    shard.mkdir()
    arrays = {
        "counts": counts,
        "codes": codes,
        "mel": np.repeat(table[codes], 4, 0).astype(np.float32),
        "wave": random.normal(0, 3000, frames * 480).astype(np.int16),
        "f0": np.full(frames, 150, np.float32),
    }
    for name, value in arrays.items():
        np.save(shard / f"{name}.npy", value)
    about = {
        "format": DECODER_DATA_FORMAT,
        "codes": 90,
        "mel_bins": 8,
        "hop": 480,
        "sample_rate": 24000,
        "frames_per_code": 4,
        "embedding": None,
        "documents": 8,
        "frames": frames,
        "mel_mean": arrays["mel"].mean(0).tolist(),
    }
    (folder / SOURCE_FILE).write_text(json.dumps(about))
    return folder


def flow_run(data, folder, **fields) -> FlowRun:
    sources = Mixture((("voice", str(data), 1.0),), seed=1)
    return FlowRun(
        **{
            "name": "flow",
            "folder": str(folder),
            "model": MODEL,
            "data": sources,
            "held_out": sources,
            "codes": 10,
            "objective": FlowObjective(chunks=(0, 5)),
            "optimizer": OPTIMIZER,
            "batch_size": 4,
            "steps": 6,
            "ema_decay": 0.9,
            "save_every": 3,
            "evaluate_batches": 1,
            "evaluate_every": 3,
            **fields,
        }
    )


def vocoder_run(data, folder, **fields) -> VocoderRun:
    sources = Mixture((("voice", str(data), 1.0),), seed=1)
    discriminators = DiscriminatorConfig(periods=(2,), period_channels=(4, 4), ffts=())
    return VocoderRun(
        **{
            "name": "vocoder",
            "folder": str(folder),
            "model": MODEL,
            "data": sources,
            "held_out": sources,
            "frames": 6,
            "objective": VocoderObjective(resolutions=((512, 128, 512),), discriminators=discriminators),
            "optimizer": OPTIMIZER,
            "batch_size": 2,
            "steps": 4,
            "save_every": 2,
            "evaluate_batches": 1,
            **fields,
        }
    )


def entries(run, name="metrics.jsonl"):
    kept = ("step", "loss", "grad_norm", "mel_loss", "stream_loss", "discriminator_loss", "mel_distance")
    with open(f"{run.folder}/{name}") as file:
        return [{key: entry[key] for key in kept if key in entry} for entry in map(json.loads, file)]


@pytest.fixture(scope="module")
def flow(data, tmp_path_factory):
    run = flow_run(data, tmp_path_factory.mktemp("flow") / "run")
    assert loop.train(run, lambda line: None) == loop.DONE
    return run


@pytest.mark.long
@pytest.mark.slow
def test_a_flow_learns_and_resumes_bit_identically(flow, data, tmp_path):
    steps = entries(flow)
    evaluations = entries(flow, "evaluations.jsonl")
    assert evaluations[1]["loss"] < evaluations[0]["loss"] < steps[0]["loss"]
    assert evaluations[1]["stream_loss"] > 0 and read_run(flow.folder) == flow
    half = flow_run(data, tmp_path / "run", steps=3)
    lines = []
    assert loop.train(half, lambda line: None) == loop.DONE
    assert loop.train(override(half, ["steps=6"]), lines.append) == loop.DONE
    assert any(line.startswith("resuming after step 3") for line in lines)
    assert entries(half) == steps and entries(half, "evaluations.jsonl") == evaluations
    ours, theirs = (Path(run.folder, "exports/6/speech_decoder/flow.safetensors").read_bytes() for run in (flow, half))
    assert ours == theirs


@pytest.mark.long
@pytest.mark.slow
def test_a_vocoder_resumes_and_the_export_of_both_speaks(flow, data, tmp_path):
    """The vocoder's export takes the flow from the flow's; what comes out streams in both ways."""
    run = vocoder_run(data, tmp_path / "run", system=flow.folder, export_dtype="float16")
    half = replace(run, folder=str(tmp_path / "half"), steps=2)
    assert loop.train(run, lambda line: None) == loop.train(half, lambda line: None) == loop.DONE
    assert loop.train(override(half, ["steps=4"]), lambda line: None) == loop.DONE
    assert entries(half) == entries(run) and entries(run, "evaluations.jsonl")[0]["mel_distance"] > 0
    folder = SystemFolder(Path(run.folder) / "exports" / "4")
    config, parts = folder.load(SPEECH_DECODER)
    assert config == MODEL and set(parts) == {"flow", "vocoder"}
    exported = Path(flow.folder, "exports/6/speech_decoder/flow.safetensors").read_bytes()
    assert (folder.path / "speech_decoder" / "flow.safetensors").read_bytes() == exported
    decoder = SpeechDecoder(config, parts)
    voice = Voice.zero(8, 1)
    codes = np.arange(12)
    wave = decoder.decode(codes, voice)
    assert wave.shape == (12 * 1920,) and np.isfinite(wave).all() and np.abs(wave).max() > 1e-4
    for start in (SpeechDecoder.stream, reference_stream):
        stream = start(decoder, voice)
        streamed = np.concatenate([stream.push(codes[:7]), stream.push(codes[7:]), stream.finish()])
        assert streamed.shape == wave.shape and np.isfinite(streamed).all()


@pytest.mark.long
@pytest.mark.slow
def test_weights_for_chunk_sizes_and_a_later_start(flow, data, tmp_path):
    """A system that has files for chunk sizes has the trained flow under their names; a run starts from an export."""
    started = flow_run(data, tmp_path / "run", init=flow.folder, model=None, steps=1)
    assert loop.train(started, lambda line: None) == loop.DONE
    assert entries(started)[0]["loss"] < entries(flow)[0]["loss"]
    two = flow_run(data, tmp_path / "two", model=replace(MODEL, chunks=(5, 25)), steps=1)
    assert loop.train(two, lambda line: None) == loop.DONE
    export_checkpoint(two.folder, tmp_path / "again", say=lambda line: None)
    exported = tmp_path / "again" / "speech_decoder"
    assert len({path.read_bytes() for path in exported.glob("flow*.safetensors")}) == 1
    assert {path.stem for path in exported.glob("*.safetensors")} == {"flow", "flow_chunk_5", "flow_chunk_25"}


@pytest.mark.long
@pytest.mark.slow
def test_rows_divided_over_two_devices_give_the_same_losses(flow, data, tmp_path):
    path = tmp_path / "run.py"
    path.write_text(
        "from tests.train.speech_decoder.test_speech_decoder_runs import flow_run\n"
        f"RUN = flow_run({str(data)!r}, {str(tmp_path / 'run')!r}, steps=3)\n"
    )
    done = tiny.run(path, "mesh.data=2", devices=2)
    assert done.returncode == 0, done.stderr
    found = entries(load_run(path))
    alone = entries(flow)[:3]
    np.testing.assert_allclose([e["loss"] for e in found], [e["loss"] for e in alone], rtol=1e-4)


@pytest.mark.long
@pytest.mark.slow
def test_sizes_that_do_not_fit_are_refused(flow, data, tmp_path):
    with pytest.raises(MossError, match="frames is 3, expected at least 5"):
        loop.train(vocoder_run(data, tmp_path / "run", frames=3))
    larger = replace(MODEL, flow=replace(MODEL.flow, chunk=4))
    with pytest.raises(MossError, match="has other sizes than the run's model"):
        loop.train(flow_run(data, tmp_path / "run", init=flow.folder, model=larger))
    with pytest.raises(MossError, match="nowhere: no such folder"):
        loop.train(flow_run(data, tmp_path / "run", system=str(tmp_path / "nowhere")))
    with pytest.raises(MossError, match="expected one of init, model and system"):
        flow_run(data, tmp_path / "run", model=None)

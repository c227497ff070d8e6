"""Parity of codes -> speech: offline, and the released streaming protocol."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from dev.parity.flow import flow_config
from dev.parity.golden import Golden, Mismatch
from dev.parity.vocoder import channels_last, load_vocoder, runner
from dev.reference import stream as reference_stream
from moss_jax.convert.tables import flow as flow_table
from moss_jax.nn.tree import param_shapes, unflatten
from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.speech_decoder.flow import sampler
from moss_jax.speech_decoder.flow.model import FlowModel
from moss_jax.speech_decoder.speaker import CAMPPLUS
from moss_jax.speech_decoder.voice import Voice


def _flow(golden: Golden):
    """(flow config, its parameters, noise buffer [1, F, M], voice, codes)."""
    stray = [name for name in golden.weights if not name.startswith(("flow.", "hift."))]
    if stray:
        raise Mismatch(f"weights that are neither flow.* nor hift.*: {', '.join(sorted(stray))}")
    config = flow_config(replace(golden, config=golden.config["flow_model"]))
    shapes = param_shapes(FlowModel(config))
    params = golden.params(flow_table.table(config), shapes, strip="flow.")
    voice = Voice.zero(config.mel_bins, config.speaker_size)
    if "prompt_token" in golden.inputs:
        voice = voice.replace(codes=golden.inputs["prompt_token"][0], mel=golden.need("prompt_feat")[0])
    if "embedding" in golden.inputs:
        voice = voice.replace(embedding=golden.inputs["embedding"][0])
    buffer = channels_last(golden.need("rand_noise"))
    codes = golden.need("token")[0]
    if buffer.shape[1] < (len(voice.codes) + len(codes)) * config.frames_per_code:
        raise Mismatch(f"input/rand_noise has {buffer.shape[1]} frames, fewer than prompt and speech")
    return config, unflatten(jax.tree.map(jnp.asarray, params)), buffer, voice, codes


def decode(golden: Golden) -> dict:
    config, params, buffer, voice, codes = _flow(golden)
    run = runner(*load_vocoder(golden, strip="hift."))
    mel = sampler.decode(params, config, codes, voice, buffer=buffer)
    wave, source = run(mel, golden.need("sine_noise"))
    results = {"mel": np.swapaxes(mel, 1, 2), "wav": wave, "source": source[:, None]}
    if {"mel", "source"} <= golden.outputs.keys():
        stored = channels_last(golden.outputs["mel"]), golden.outputs["source"][:, 0]
        results["wav@stored_source"] = run(*stored, method="decode")
    return results


def decode_stream(golden: Golden) -> dict:
    """The schedule, and for each chunk the mel, source and waveform."""
    if golden.contract.get("mode", "reference") != "reference":
        raise Mismatch(f"contract: unknown mode {golden.contract['mode']!r}, expected 'reference'")
    flow, params, buffer, voice, codes = _flow(golden)
    vocoder, vocoder_params = load_vocoder(golden, strip="hift.")
    flow = replace(flow, chunk=golden.config.get("chunk_size", flow.chunk))
    rate = vocoder.sample_rate / (flow.frames_per_code * vocoder.hop)
    speaker = replace(CAMPPLUS, embedding_size=flow.speaker_size)
    config = SpeechDecoderConfig(flow, vocoder, speaker, chunks=(), code_rate=rate)

    def noise(index: int, frames: int) -> np.ndarray:
        given = golden.need(f"sine_noise_{index}")[0].astype(np.float32)
        if len(given) != frames * vocoder.hop:
            raise Mismatch(f"input/sine_noise_{index} has {len(given)} samples, the chunk {frames * vocoder.hop}")
        return given

    models = reference_stream.Models(config, flow, params, vocoder_params, voice, noise, buffer)
    state, chunks = reference_stream.advance(models, reference_stream.ReferenceState(), codes)
    chunks.append(reference_stream.close(models, state))
    results = {"schedule": np.array([[c.cursor, c.codes, len(c.wave), c is chunks[-1]] for c in chunks], np.int32)}
    for i, c in enumerate(chunks):
        results |= {
            f"chunk_{i}_mel": c.mel.T[None],
            f"chunk_{i}_source": c.source[None, None],
            f"chunk_{i}_wav": c.wave[None],
        }
    return results


COMPONENTS = {"codec.decode": decode, "codec.decode_stream": decode_stream}

"""Mel -> wave at full size with random weights, whole and in pieces, and codes -> wave offline, against the reference
classes.

The peer has our weights. The waves of both vocoders are compared for the same source signal; when timed, each draws its
own noise.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dev.bench import Options, Row, compare, flow
from dev.bench.reference import reference_module
from moss_jax.convert.tables.vocoder import table
from moss_jax.errors import MossError
from moss_jax.nn.tree import param_shapes, unflatten
from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.speech_decoder.decoder import SpeechDecoder, vocode
from moss_jax.speech_decoder.speaker import CAMPPLUS
from moss_jax.speech_decoder.vocoder import HiFT, VocoderConfig
from moss_jax.speech_decoder.vocoder import config as vocoder
from moss_jax.speech_decoder.vocoder import stream as vocoder_stream
from moss_jax.speech_decoder.voice import Voice

SIZES = {
    "full": vocoder.RELEASED,
    "mid": replace(vocoder.RELEASED, channels=256),
    "tiny": replace(vocoder.TINY, f0_layers=5),
}
SECONDS = 4.0  # of mel
CODES = 50  # of the offline decode, 4 s, after a prompt of flow.PROMPT
TOLERANCE = 1e-4  # maximum difference of two waves of one source


def run(options: Options) -> Iterator[Row]:
    """Rows for the vocoder on a whole mel and on a piece of a stream, and for flow and vocoder together."""
    if options.size not in SIZES:
        raise MossError(f"bench vocoder: unknown size {options.size!r}, expected one of {', '.join(SIZES)}")
    sizes = flow.SIZES[options.size]
    config = SpeechDecoderConfig(
        flow=sizes,
        vocoder=replace(SIZES[options.size], mel_bins=sizes.mel_bins),
        speaker=replace(CAMPPLUS, embedding_size=sizes.speaker_size),
        chunks=(),
    )
    params = random_params(config.vocoder)
    flow_params = flow.random_params(sizes)
    decoder = SpeechDecoder(config, {"flow": flow_params, "vocoder": unflatten(params)})
    peer = Peer(config.vocoder, params, options.reference) if options.peer and options.reference else None
    row = partial(compare, repeats=options.repeats, peer_name="reference classes, PyTorch" if peer else "")

    rate = config.code_rate * sizes.frames_per_code
    mel = np.random.default_rng(0).normal(-5, 2, (int(SECONDS * rate), sizes.mel_bins)).astype(np.float32)
    if peer:
        _same(decoder, mel, peer)
    whole = partial(vocode, decoder.vocoder_params, decoder.vocoder_config, mel, 0)
    yield row(f"vocoder, {SECONDS:g} s", whole, partial(peer.wave, mel) if peer else None, note=f"{len(mel)} frames")

    piece = sizes.chunk_frames
    state = vocoder_stream.init_state(config.vocoder, config.mel_overlap, config.mel_context)
    state = state.replace(frames=jnp.asarray(1000, jnp.int32))
    step = jax.jit(partial(_step, decoder.vocoder_config, config.mel_overlap))
    ours = partial(step, decoder.vocoder_params, state, mel[:piece])
    theirs = partial(peer.wave, mel[: piece + config.mel_overlap]) if peer else None
    note = f"{piece} new frames; ours computes {piece + config.mel_context}, the peer {piece + config.mel_overlap}"
    yield row("vocoder, a piece of a stream", ours, theirs, note=note)

    random = np.random.default_rng(0)
    prompt, codes = np.split(
        random.integers(0, sizes.codebook_size, flow.PROMPT + CODES).astype(np.int32), [flow.PROMPT]
    )
    prompt_mel = random.normal(size=(len(prompt) * sizes.frames_per_code, sizes.mel_bins)).astype(np.float32)
    voice = Voice(prompt, prompt_mel, random.normal(size=sizes.speaker_size).astype(np.float32))
    decode = None
    if peer:
        flow_peer = flow.Peer(sizes, flow_params, options.reference, voice)

        def decode() -> np.ndarray:
            return peer.wave(flow_peer.mel(codes, False, True)[0])

    note = f"{CODES / config.code_rate:g} s of speech, prompt {flow.PROMPT} codes"
    yield row(f"codes to wave offline, {CODES} codes", partial(decoder.decode, codes, voice), decode, note=note)


def random_params(config: VocoderConfig) -> dict[str, Any]:
    """Flat parameters with weight norm in two parts, with the scale of their initial values in training."""
    random = np.random.default_rng(0)
    flat = {}
    mel = jnp.zeros((1, 2, config.mel_bins))
    noise = jnp.zeros((1, 2 * config.hop, config.harmonics))
    for path, leaf in param_shapes(HiFT(config), mel, noise).items():
        name = path.rsplit("/", 1)[-1]
        value = random.standard_normal(leaf.shape, np.float32) * 0.02
        flat[path] = np.abs(value) + 1 if name.startswith("alpha") else value
    for path in [path for path in flat if path.endswith("/g")]:
        others = tuple(axis for axis in (-3, -2, -1) if axis != (-2 if path.startswith("ups_") else -1))
        flat[path] = np.sqrt(np.square(flat[path[:-1] + "v"]).sum(others))
    return flat


def _step(config, overlap, params, state, mel):
    with jax.default_matmul_precision("highest"):
        count = jnp.asarray(mel.shape[0], jnp.int32)
        return vocoder_stream.step(params, config, overlap, state, mel, count, False, jnp.uint32(0))


def _same(decoder: SpeechDecoder, mel: np.ndarray, peer: "Peer") -> None:
    config = decoder.vocoder_config
    source = np.random.default_rng(1).normal(0, 0.05, len(mel) * config.hop).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(partial(HiFT(config).apply, method="decode"))
        ours = apply({"params": decoder.vocoder_params}, mel[None], source[None])[0]
    difference = np.abs(np.asarray(ours) - peer.wave(mel, source)).max()
    if not difference < TOLERANCE:
        raise MossError(f"bench vocoder: the wave differs from the reference's by {difference:.2g}")


class Peer:
    """`HiFTGenerator` of the reference with our weights."""

    def __init__(self, config: VocoderConfig, params: dict[str, Any], checkout: Path):
        import torch

        generator = reference_module(checkout, "cosyvoice.hifigan.generator")
        predictor = reference_module(checkout, "cosyvoice.hifigan.f0_predictor")
        self._torch = torch
        self._model = generator.HiFTGenerator(
            in_channels=config.mel_bins,
            base_channels=config.channels,
            nb_harmonics=config.harmonics - 1,
            sampling_rate=config.sample_rate,
            nsf_alpha=config.sine_amplitude,
            nsf_sigma=config.noise_std,
            nsf_voiced_threshold=config.voiced_threshold,
            upsample_rates=list(config.upsample_rates),
            upsample_kernel_sizes=list(config.upsample_widths),
            istft_params={"n_fft": config.fft_size, "hop_len": config.fft_hop},
            resblock_kernel_sizes=list(config.resblock_widths),
            resblock_dilation_sizes=list(map(list, config.resblock_dilations)),
            source_resblock_kernel_sizes=list(config.source_resblock_widths),
            source_resblock_dilation_sizes=list(map(list, config.source_resblock_dilations)),
            lrelu_slope=config.leaky_slope,
            audio_limit=config.audio_limit,
            f0_predictor=predictor.ConvRNNF0Predictor(1, config.mel_bins, config.f0_channels),
        ).eval()
        weights = {name: torch.from_numpy(weight) for name, weight in table(config).to_theirs(params)}
        self._model.load_state_dict(weights, strict=True)

    def wave(self, mel: np.ndarray, source: np.ndarray | None = None) -> np.ndarray:
        """Log-mel [T, M] -> wave [hop * T]; without a source the vocoder generates one."""
        torch = self._torch
        mel = torch.from_numpy(np.ascontiguousarray(mel.T))[None]
        with torch.inference_mode():
            if source is None:
                return self._model.inference(speech_feat=mel)[0][0].numpy()
            return self._model.decode(x=mel, s=torch.from_numpy(source)[None, None])[0].numpy()

"""Codes -> mel at full size with random weights: offline, and one chunk of a stream, against the reference classes.

The peer has our weights. Its stream has no caches: each chunk runs the model on the prompt and all codes so far. Both
are timed alternately, and their mels are compared.
"""

import gc
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dev.bench import Options, Row, compare
from dev.bench.reference import reference_module
from moss_jax.convert.tables.flow import table
from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten, param_shapes, unflatten
from moss_jax.speech_decoder.flow import sampler, stream
from moss_jax.speech_decoder.flow.config import RELEASED_CHUNK_5, TINY, EstimatorConfig, FlowConfig
from moss_jax.speech_decoder.flow.model import FlowModel

SIZES = {
    "full": RELEASED_CHUNK_5,
    "mid": replace(RELEASED_CHUNK_5, estimator=EstimatorConfig(num_mid_stages=2)),
    "tiny": TINY,
}
PROMPT = 50  # codes
OFFLINE = 100  # codes
CHUNKS = (8, 108, 208)  # codes received when the timed chunk is computed
LONG = 512
TOLERANCE = 1e-3  # maximum difference as a fraction of the largest value


def run(options: Options) -> Iterator[Row]:
    """Rows for offline decode, chunks early and late in an exact stream, and the same with the default bounds."""
    if options.size not in SIZES:
        raise MossError(f"bench flow: unknown size {options.size!r}, expected one of {', '.join(SIZES)}")
    config = SIZES[options.size]
    params = random_params(config)
    voice, codes = _inputs(config)
    peer = None
    if options.peer and options.reference and options.size != "tiny":  # the reference hard-codes 80 bins, 512 channels
        peer = Peer(config, params, options.reference, voice)
    name = "reference classes, PyTorch" if peer else ""
    row = partial(compare, repeats=options.repeats, peer_name=name)

    def offline():
        return sampler.decode(params, config, codes[:OFFLINE], voice)

    note = f"{config.chunk}-code chunks, prompt {PROMPT} codes"
    if peer:
        _same(offline(), peer.mel(codes[:OFFLINE], False, True), "offline")
    yield row(
        f"offline, {OFFLINE} codes",
        offline,
        partial(peer.mel, codes[:OFFLINE], False, True) if peer else None,
        note=note,
    )

    flow = stream.CachedFlow(params, config, memory=_memory(config, PROMPT + len(codes)))
    request = flow.stream(flow.prefill(voice))
    start = 0
    for count in CHUNKS:
        # Only the last of these chunks is timed and compared.
        seconds, mel = _advance(request, codes, start, count)
        start = count
        theirs = []
        if peer:
            begin = time.perf_counter()
            expected = peer.mel(codes[:count], True, False)
            theirs = [time.perf_counter() - begin]
            _same(mel, expected[:, -mel.shape[1] :], f"chunk at {count} codes")
        yield Row(f"exact chunk at {count} codes", seconds[-1:], theirs, name, "one run each")
    del request
    gc.collect()
    yield from _long(flow, voice, codes, "exact")
    del flow
    gc.collect()
    small = stream.CachedFlow(params, config)
    yield from _long(small, voice, codes, f"by default, a window of {small.window * config.chunk} codes at the end")


def _long(flow: stream.CachedFlow, voice: Any, codes: np.ndarray, name: str) -> Iterator[Row]:
    """The time of a chunk early and late in one long stream, without compilation."""
    request = flow.stream(flow.prefill(voice))
    start = 0
    early: list[float] = []
    for count in (50, len(codes)):
        seconds, _ = _advance(request, codes, start, count)
        start = count
        late = seconds[-3:]
        early = early or late
        state_gib = sum(leaf.nbytes for leaf in jax.tree.leaves(request.state)) / 2**30
        ratio = f", {np.median(late) / np.median(early):.2f} x the tenth chunk" if count > 50 else ""
        yield Row(f"{name}: chunk at {count} codes", late, note=f"state {state_gib:.1f} GiB{ratio}")


def _advance(request: stream.FlowStream, codes: np.ndarray, start: int, end: int) -> tuple[list[float], jax.Array]:
    """Pushes codes[start:end] in chunks. Returns the seconds of each computed chunk and the mel of the last."""
    config = request.flow.config
    seconds = []
    mel = None
    for first in range(start, end, config.chunk):
        begin = time.perf_counter()
        done = int(request.state.chunk)
        part = jax.block_until_ready(request.push(codes[first : min(first + config.chunk, end)]))
        if int(request.state.chunk) > done:
            seconds.append((time.perf_counter() - begin) / (int(request.state.chunk) - done))
            mel = part[:, -config.chunk_frames :]
    assert mel is not None, "no chunk was computed"
    return seconds, mel


def _memory(config: FlowConfig, codes: int) -> int:
    return -(-codes // config.chunk) * stream.chunk_bytes(config)


def _inputs(config: FlowConfig) -> tuple[Any, np.ndarray]:
    random = np.random.default_rng(0)
    longest = min(PROMPT + LONG, config.max_codes)
    codes = random.integers(0, config.codebook_size, longest).astype(np.int32)
    voice = SimpleNamespace(
        codes=codes[:PROMPT],
        mel=random.standard_normal((PROMPT * config.frames_per_code, config.mel_bins), np.float32),
        embedding=random.standard_normal(config.speaker_size, np.float32),
    )
    return voice, codes[PROMPT:]


def random_params(config: FlowConfig) -> dict:
    random = np.random.default_rng(0)
    flat = {}
    for path, leaf in param_shapes(FlowModel(config)).items():
        name = path.rsplit("/", 1)[-1]
        if name in ("scale", "bias"):
            flat[path] = jnp.full(leaf.shape, float(name == "scale"), jnp.float32)
        else:
            flat[path] = jnp.asarray(random.standard_normal(leaf.shape, np.float32) * 0.03)
    return unflatten(flat)


def _same(ours: jax.Array, theirs: np.ndarray, what: str) -> None:
    difference = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    if not difference < TOLERANCE:
        raise MossError(f"bench flow: {what} differs from the reference by {difference:.2g} of its largest value")


class Peer:
    """`CausalMaskedDiffWithXvec` of the reference with our weights and voice."""

    def __init__(self, config: FlowConfig, params: dict, checkout: Any, voice: Any):
        import torch

        flow, matching, decoder, upsample = (
            reference_module(checkout, f"cosyvoice.{name}")
            for name in ("flow.flow", "flow.flow_matching", "flow.decoder", "transformer.upsample_encoder")
        )
        from omegaconf import DictConfig

        encoder = config.encoder
        estimator = config.estimator
        self._torch = torch
        self._model = flow.CausalMaskedDiffWithXvec(
            input_size=encoder.hidden_size,
            output_size=config.mel_bins,
            spk_embed_dim=config.speaker_size,
            output_type="mel",
            vocab_size=config.vocab_size,
            input_frame_rate=12.5,
            only_mask_loss=True,
            token_mel_ratio=config.frames_per_code,
            pre_lookahead_len=config.lookahead,
            encoder=upsample.UpsampleConformerEncoder(
                output_size=encoder.hidden_size,
                attention_heads=encoder.num_heads,
                linear_units=encoder.intermediate_size,
                num_blocks=encoder.num_layers,
                normalize_before=True,
                input_layer="linear",
                pos_enc_layer_type="rel_pos_espnet",
                selfattention_layer_type="rel_selfattn",
                input_size=encoder.hidden_size,
                upsample_stride=config.frames_per_code,
                use_cnn_module=False,
                macaron_style=False,
                static_chunk_size=config.chunk,
            ),
            decoder=matching.CausalConditionalCFM(
                in_channels=3 * config.mel_bins,
                n_spks=1,
                spk_emb_dim=config.mel_bins,
                cfm_params=DictConfig(
                    {
                        "sigma_min": 1e-6,
                        "solver": "euler",
                        "t_scheduler": "cosine",
                        "training_cfg_rate": 0.2,
                        "inference_cfg_rate": config.guidance,
                        "reg_loss_type": "l1",
                    }
                ),
                estimator=decoder.CausalConditionalDecoder(
                    in_channels=config.estimator_inputs,
                    out_channels=config.mel_bins,
                    dropout=0.0,
                    act_fn="gelu",
                    channels=[estimator.channels],
                    n_blocks=estimator.num_blocks,
                    num_heads=estimator.num_heads,
                    num_mid_blocks=estimator.num_mid_stages,
                    attention_head_dim=estimator.head_dim,
                    static_chunk_size=config.chunk_frames,
                    num_decoding_left_chunks=-1,
                ),
            ),
        ).eval()
        weights = table(config).to_theirs({path: np.asarray(leaf) for path, leaf in flatten(params).items()})
        self._model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights}, strict=True)
        self._voice = [torch.from_numpy(np.array(leaf))[None] for leaf in (voice.codes, voice.mel, voice.embedding)]

    def mel(self, codes: np.ndarray, streaming: bool, finalize: bool) -> np.ndarray:
        """The mel of one run over the prompt and `codes`, float32 [1, T, M], without the prompt."""
        torch = self._torch
        (prompt, mel, embedding) = self._voice

        def length(x):
            return torch.tensor([x.shape[1]], dtype=torch.int32)

        token = torch.from_numpy(np.array(codes, np.int32))[None]
        with torch.inference_mode():
            out, _ = self._model.inference(
                token, length(token), prompt, length(prompt), mel, length(mel), embedding, streaming, finalize
            )
        return out.numpy().transpose(0, 2, 1)

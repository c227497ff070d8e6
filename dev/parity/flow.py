"""The flow's components: `codec.flow_encoder`, `codec.estimator`, `codec.flow_noise`, `codec.flow`."""

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dev.parity.golden import Golden, Mismatch
from moss_jax.convert.tables.flow import table
from moss_jax.nn.tree import param_shapes, unflatten
from moss_jax.speech_decoder.flow import sampler
from moss_jax.speech_decoder.flow.config import EncoderConfig, EstimatorConfig, FlowConfig
from moss_jax.speech_decoder.flow.model import FlowModel
from moss_jax.speech_decoder.flow.noise import noise


def flow_config(golden: Golden) -> FlowConfig:
    """Our config from the reference's constructor arguments; values that a file lacks are the released ones."""
    groups = {name: golden.config.get(name, {}) for name in ("flow", "encoder", "estimator", "cfm_params")}
    flow = groups["flow"]
    encoder = groups["encoder"]
    estimator = groups["estimator"]

    def given(group: dict[str, Any], default: Any, **names: str) -> dict[str, Any]:
        return {ours: group.get(theirs, getattr(default, ours)) for ours, theirs in names.items()}

    channels = estimator.get("channels", [256])
    mel_bins = estimator.get("out_channels", flow.get("output_size", 80))
    vocab = flow.get("vocab_size", 20480)
    config = FlowConfig(
        vocab_size=vocab,
        codebook_size=vocab,
        mel_bins=mel_bins,
        guidance=groups["cfm_params"].get("inference_cfg_rate", 0.7),
        chunk=encoder.get("static_chunk_size", 25),
        frames_per_code=encoder.get("upsample_stride", flow.get("token_mel_ratio", 4)),
        **given(flow, FlowConfig(), speaker_size="spk_embed_dim", lookahead="pre_lookahead_len"),
        encoder=EncoderConfig(
            **given(
                encoder,
                EncoderConfig(),
                hidden_size="output_size",
                num_heads="attention_heads",
                intermediate_size="linear_units",
                num_layers="num_blocks",
                num_up_layers="num_up_blocks",
            )
        ),
        estimator=EstimatorConfig(
            channels=channels[0],
            intermediate_size=4 * channels[0],
            time_size=estimator.get("time_embed_dim", 4 * channels[0]),
            **given(
                estimator,
                EstimatorConfig(),
                num_heads="num_heads",
                head_dim="attention_head_dim",
                num_blocks="n_blocks",
                num_mid_stages="num_mid_blocks",
            ),
        ),
    )
    if len(channels) != 1 or estimator.get("in_channels", 4 * mel_bins) != config.estimator_inputs:
        raise Mismatch("estimator: expected one level of channels and in_channels = 4 * out_channels")
    return config


def _bound(golden: Golden, config: FlowConfig, *parts: str):
    """`FlowModel.apply` with the weights of the file, which has those of the named parts of the model, or of all."""
    tree = param_shapes(FlowModel(config))
    tree = {path: leaf for path, leaf in tree.items() if not parts or path.split("/")[0] in parts}
    params = unflatten(golden.params(table(config), tree, golden.meta.get("weight_prefix", "")))
    return partial(FlowModel(config).apply, {"params": jax.tree.map(jnp.asarray, params)})


def _highest(function):
    def run(golden: Golden) -> dict[str, Any]:
        with jax.default_matmul_precision("highest"):
            return function(golden)

    return run


@_highest
def flow_encoder(golden: Golden) -> dict[str, Any]:
    config = flow_config(golden)
    apply = _bound(golden, config, "encoder")
    frames = config.frames_per_code
    results = {}

    def run(x, context, lengths, chunk):
        embed = partial(apply, method=lambda model, x: model.encoder.embed(x))
        ahead = jnp.zeros((x.shape[0], config.lookahead, x.shape[2])) if context is None else embed(context)
        valid = np.arange(x.shape[1]) < (np.full(x.shape[0], x.shape[1]) if lengths is None else lengths)[:, None]
        rows = jnp.concatenate([embed(x), ahead], 1)
        encode = jax.jit(lambda *inputs: apply(*inputs, chunk, method=lambda model, *inputs: model.encoder(*inputs))[0])
        return encode(rows, valid), np.repeat(valid, frames, 1)

    for name, chunk in (("full", None), ("streaming", config.chunk)):
        if "xs" in golden.inputs:
            states, valid = run(golden.inputs["xs"], None, golden.inputs.get("xs_lens"), chunk)
            results[f"{name}_h"] = (states, golden.compared(f"{name}_h", valid))
            results[f"{name}_masks"] = valid[:, None].astype(np.int32)
        if "xs1" in golden.inputs:
            context = golden.inputs.get("context1")
            lengths = golden.inputs.get("xs1_lens")
            states, valid = run(golden.inputs["xs1"], context, lengths, chunk)
            results[f"{name}_context_h"] = (states, valid[..., None])
    return results


@_highest
def estimator(golden: Golden) -> dict[str, Any]:
    config = flow_config(golden)
    apply = _bound(golden, config, "estimator", "time")
    chunk_frames = golden.config["estimator"].get("static_chunk_size", config.chunk_frames)
    x, mu, t = (golden.need(name) for name in ("x", "mu", "t"))
    speaker = golden.inputs.get("spks", np.zeros(x.shape[:2], np.float32))
    prompt = golden.inputs.get("cond", np.zeros_like(x))
    x, mu, prompt = (value.transpose(0, 2, 1) for value in (x, mu, prompt))
    compiled = jax.jit(lambda *inputs: apply(*inputs, method="velocity")[0], static_argnums=6)
    results = {}
    for output in {name.partition("@")[0] for name in golden.final}:
        kind, _, mask = output.partition("_")
        if kind not in ("full", "streaming"):
            continue
        valid = golden.inputs.get(mask, np.ones((x.shape[0], 1, x.shape[1])))[:, 0] > 0
        time = apply(jnp.asarray(t), method="time_embedding")
        chunk = chunk_frames if kind == "streaming" else None
        velocity = compiled(x, mu, speaker, prompt, time, valid, chunk)
        results[output] = np.asarray(velocity).transpose(0, 2, 1)
    return results


def flow_noise(golden: Golden) -> dict[str, Any]:
    if golden.weights:
        raise Mismatch(f"{golden.component} has no weights, but the file holds {', '.join(sorted(golden.weights))}")
    _, bins, frames = golden.config["shape"]
    if golden.config.get("seed", 0) != 0:
        raise Mismatch(f"the noise is that of seed 0, the file asks for seed {golden.config['seed']}")
    buffer = noise(frames, bins).transpose(0, 2, 1)
    return {f"columns_{start}_{end}": buffer[:, :, start:end] for start, end in golden.config["slices"]}


@_highest
def flow(golden: Golden) -> dict[str, Any]:
    config = flow_config(golden)
    tree = param_shapes(FlowModel(config))
    params = unflatten(golden.params(table(config), tree, golden.meta.get("weight_prefix", "")))
    codes = golden.need("token")[0]
    buffer = golden.need("rand_noise").transpose(0, 2, 1)
    zero = SimpleNamespace(
        codes=np.zeros(0, np.int32),
        mel=np.zeros((0, config.mel_bins), np.float32),
        embedding=np.zeros(config.speaker_size, np.float32),
    )
    voice = SimpleNamespace(
        codes=golden.inputs["prompt_token"][0] if "prompt_token" in golden.inputs else zero.codes,
        mel=golden.inputs["prompt_feat"][0] if "prompt_feat" in golden.inputs else zero.mel,
        embedding=golden.inputs["embedding"][0] if "embedding" in golden.inputs else zero.embedding,
    )
    if buffer.shape[1] < (len(voice.codes) + len(codes)) * config.frames_per_code:
        raise Mismatch(f"rand_noise has {buffer.shape[1]} columns, fewer than the mel frames of the run")

    def run(voice, **flags):
        states = sampler.decode(params, config, codes, voice, buffer=buffer, states=True, **flags)
        return np.asarray(states).transpose(0, 1, 3, 2)  # [steps + 1, 1, M, T]

    results = {}
    start = len(voice.codes) * config.frames_per_code
    wanted = {name.partition("@")[0] for name in golden.final}
    for name in wanted:
        match = re.fullmatch(r"(full_)?mel_streaming([01])_finalize([01])", name)
        if match:
            mel = run(voice, streaming=match[2] == "1", finalize=match[3] == "1")[-1]
            results[name] = mel if match[1] else mel[:, :, start:]
    if "mel_noprompt_zeroemb" in wanted:
        results["mel_noprompt_zeroemb"] = run(zero)[-1]
    if "euler_x" in wanted:
        results["euler_x"] = run(voice)[:, 0]
    return results


COMPONENTS = {
    "codec.flow_encoder": flow_encoder,
    "codec.estimator": estimator,
    "codec.flow_noise": flow_noise,
    "codec.flow": flow,
}

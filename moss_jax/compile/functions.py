"""The functions that `moss-jax compile` compiles, with the shapes and shardings of their arguments."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moss_jax.compile.request import TRAINING_FUNCTIONS, CompileRequest
from moss_jax.generate import GenerationSettings, decode_chunk, new_state, prefill
from moss_jax.nn.qwen3 import CACHE_AXES
from moss_jax.nn.tree import param_shapes, unflatten
from moss_jax.sharding import fitting, shardings_for
from moss_jax.speech_decoder import config as decoder_configs
from moss_jax.speech_decoder.flow.model import FlowModel
from moss_jax.speech_decoder.flow.sampler import flow
from moss_jax.speech_decoder.vocoder import HiFT
from moss_jax.speech_lm import MOSS_SPEECH_8B, TINY, SpeechLMConfig, model_axes, model_shapes
from moss_jax.speech_tokenizer import config as tokenizer_configs
from moss_jax.speech_tokenizer.encode import encode_padded
from moss_jax.speech_tokenizer.encoder import init_params

Function = Any  # what jax.jit returns: it has .lower(*arguments)
Arguments = tuple[Any, ...]  # trees of jax.ShapeDtypeStruct with shardings


def build(request: CompileRequest, mesh: Mesh) -> tuple[Function, Arguments]:
    """The jitted function of a request and its arguments, as shapes with shardings on `mesh`."""
    return BUILDERS[request.function](request, mesh)


def _with_shardings(tree: Any, axes: Callable[[tuple, Any], tuple], mesh: Mesh) -> Any:
    """The shapes of `tree` with shardings; `axes(path, leaf)` names the logical axes of a leaf."""

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=fitting(axes(path, leaf), leaf.shape, mesh))

    return jax.tree.map_with_path(place, tree)


def _over_batch(_: tuple, leaf: Any) -> tuple:
    """Logical axes of an input that is divided over the batch."""
    return ("batch",) * (leaf.ndim > 0) + (None,) * (leaf.ndim - 1)


def _replicated(_: tuple, leaf: Any) -> tuple:
    return (None,) * leaf.ndim


def _generation(request: CompileRequest, mesh: Mesh) -> tuple[SpeechLMConfig, Any, Any]:
    """Config, nested parameters and GenerationState; the last two are shapes with shardings."""
    config = {"8b": MOSS_SPEECH_8B, "tiny": TINY}[request.size]
    shapes = model_shapes(config)
    shardings = shardings_for(model_axes(config), shapes, mesh)
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path]) for path, leaf in shapes.items()
    }
    state = jax.eval_shape(lambda: new_state(config, request.batch, request.context))

    def axes(path: tuple, leaf: Any) -> tuple:
        return CACHE_AXES if leaf.ndim == len(CACHE_AXES) else _over_batch(path, leaf)

    return config, unflatten(params), _with_shardings(state, axes, mesh)


def _prefill(request: CompileRequest, mesh: Mesh) -> tuple[Function, Arguments]:
    config, params, state = _generation(request, mesh)
    inputs = (
        jax.ShapeDtypeStruct((request.batch, request.context, 2), jnp.int32),
        jax.ShapeDtypeStruct((request.batch, request.context), jnp.bool_),
    )
    inputs = _with_shardings(inputs, _over_batch, mesh)

    def run(params, state, rows, valid, count):
        return prefill(params, state, rows, valid, count, state.keys, config=config)

    function = jax.jit(run, donate_argnums=1, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state))
    return function, (params, state, *inputs, jax.ShapeDtypeStruct((), jnp.int32))


def _decode(request: CompileRequest, mesh: Mesh) -> tuple[Function, Arguments]:
    config, params, state = _generation(request, mesh)

    def run(params, state, k):
        return decode_chunk(params, state, GenerationSettings(), k, config=config)

    function = jax.jit(run, donate_argnums=1, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state))
    return function, (params, state, jax.ShapeDtypeStruct((), jnp.int32))


def _codec_encode(request: CompileRequest, mesh: Mesh) -> tuple[Function, Arguments]:
    config = {"8b": tokenizer_configs.MOSS_SPEECH_CODEC, "tiny": tokenizer_configs.TINY}[request.size]
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    waves = jax.ShapeDtypeStruct((request.batch, config.samples_per_segment), jnp.float32)
    lengths = jax.ShapeDtypeStruct((request.batch,), jnp.int32)
    inputs = _with_shardings((waves, lengths), _over_batch, mesh)
    params = _with_shardings(params, _replicated, mesh)
    return jax.jit(lambda *args: encode_padded(config, *args)), (params, *inputs)


def _codec_decode(request: CompileRequest, mesh: Mesh) -> tuple[Function, Arguments]:
    config = {"8b": decoder_configs.RELEASED, "tiny": decoder_configs.TINY}[request.size]
    size = config.flow
    batch = request.batch
    frames = request.context * size.frames_per_code
    vocoder = HiFT(dataclasses.replace(config.vocoder, weight_norm=False))

    def run(flow_params, vocoder_params, noise, codes, count, prompt, embedding, sine_noise):
        with jax.default_matmul_precision("highest"):
            mel = flow(flow_params, size, noise, codes, count, prompt, embedding)[-1]
            lengths = count * size.frames_per_code
            return vocoder.apply({"params": vocoder_params}, mel, sine_noise, lengths)[0]

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    # Four frames are enough to learn the parameter shapes of the vocoder.
    vocoder_inputs = (
        array(1, 4, size.mel_bins),
        array(1, 4 * config.vocoder.hop, config.vocoder.harmonics),
    )
    params = (
        unflatten(param_shapes(FlowModel(size))),
        unflatten(param_shapes(vocoder, *vocoder_inputs)),
    )
    inputs = (
        array(batch, request.context, dtype=jnp.int32),
        array(batch, dtype=jnp.int32),
        array(batch, frames, size.mel_bins),
        array(batch, size.speaker_size),
        array(batch, frames * config.vocoder.hop, config.vocoder.harmonics),
    )
    noise = array(1, frames, size.mel_bins)
    return jax.jit(run), (
        *_with_shardings((*params, noise), _replicated, mesh),
        *_with_shardings(inputs, _over_batch, mesh),
    )


def _train_step(request: CompileRequest, mesh: Mesh) -> tuple[Function, Arguments]:
    from moss_jax.compile.training import train_step

    return train_step(request, mesh)


BUILDERS: dict[str, Callable[[CompileRequest, Mesh], tuple[Function, Arguments]]] = {
    "prefill": _prefill,
    "decode": _decode,
    "codec-encode": _codec_encode,
    "codec-decode": _codec_decode,
    **dict.fromkeys(TRAINING_FUNCTIONS, _train_step),
}

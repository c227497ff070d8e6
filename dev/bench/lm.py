"""The language model: prefill and decode of a spoken reply, against transformers' Qwen3.

A spoken reply runs the shared layers, the audio layers and the audio head. The peer is transformers' `Qwen3ForCausalLM`
with as many layers and a head of the same size, so that both multiply the same matrices. Both sample with the settings
of the released driver, in the same dtype on the same backend: bfloat16 on an accelerator, float32 on a CPU.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dev.bench import Options, Row, compare
from moss_jax.errors import MossError
from moss_jax.generate import (
    ChannelSettings,
    GenerationSettings,
    GenerationState,
    decode_chunk,
    new_state,
    prefill,
    request_keys,
)
from moss_jax.nn.tree import unflatten
from moss_jax.speech_lm import MOSS_SPEECH_8B, TINY, SpeechLMConfig, model_shapes

SIZES = {
    "full": MOSS_SPEECH_8B,
    "mid": replace(
        MOSS_SPEECH_8B,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_shared_layers=12,
        num_modality_layers=2,
    ),  # layers like those of Qwen3-0.6B, half as many
    "tiny": TINY,
}
PROMPT = 512
STEPS = 25
BATCHES: tuple[int, ...] = (1, 16)


def run(options: Options) -> Iterator[Row]:
    """Rows for a prompt of 512 and decode steps, batch 1 and 16 (on a CPU: 128, fewer steps, 1 and 4)."""
    if options.size not in SIZES:
        raise MossError(f"bench lm: unknown size {options.size!r}, expected one of {', '.join(SIZES)}")
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    config = replace(SIZES[options.size], dtype=dtype, param_dtype=dtype)
    prompt = PROMPT // 4 if on_cpu else PROMPT
    steps = 5 if on_cpu else STEPS
    batches = (1, 4) if on_cpu else BATCHES
    if options.size == "tiny":  # only a check that the benchmark runs
        batches = batches[:1]
    params = random_params(config)
    peer = Peer(config) if options.peer and _importable("transformers") else None
    bandwidth = 0.0 if on_cpu else copy_bandwidth()
    weights = step_bytes(config)
    for batch in batches:
        ours = Ours(config, params, batch, prompt, steps * (options.repeats + 1))
        peer_prefill = None
        peer_decode = None
        if peer:
            peer.set_batch(batch, prompt, steps)
            peer_prefill = peer.prefill
            peer_decode = peer.decode
        row = partial(compare, repeats=options.repeats, peer_name="transformers generate" if peer else "")
        yield row(f"prefill, {batch} x {prompt} rows", ours.prefill, peer_prefill, note=dtype)
        ours.prefill()
        result = row(f"decode, {steps} steps, batch {batch}", partial(ours.decode, steps), peer_decode)
        seconds = float(np.median(result.ours)) / steps
        result.note = f"{dtype}, {1 / seconds:.1f} steps/s"
        if bandwidth:
            result.note += (
                f", weights at {weights / seconds / bandwidth:.0%} of copy bandwidth {bandwidth / 1e9:.0f} GB/s"
            )
        yield result


def random_params(config: SpeechLMConfig) -> dict:
    """Random parameters, drawn on the device one by one."""
    shapes = model_shapes(config)

    @partial(jax.jit, static_argnums=(1, 2))
    def draw(key, shape, dtype):
        # 16 random bits an entry are enough and need no float32 copy of the largest array
        bits = jax.random.bits(key, shape, jnp.uint16)
        return ((bits.astype(dtype) / 2**16 - 0.5) * 0.05).astype(dtype)

    keys = jax.random.split(jax.random.key(0), len(shapes))
    flat = {}
    for key, (path, leaf) in zip(keys, shapes.items(), strict=True):
        scale = path.endswith("scale")
        flat[path] = jnp.ones(leaf.shape, leaf.dtype) if scale else draw(key, leaf.shape, leaf.dtype)
    return unflatten(flat)


def step_bytes(config: SpeechLMConfig) -> int:
    """Bytes of weights that one step of a spoken reply reads: shared layers, audio layers, audio head."""
    shapes = model_shapes(config)
    read = ("shared/layers/", "audio/layers/", "audio/head/")
    return sum(leaf.size * leaf.dtype.itemsize for path, leaf in shapes.items() if path.startswith(read))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying 1 GiB on the device: the best of ten."""
    x = jnp.zeros((2**28,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(x))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(copy(x))
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(seconds)


class Ours:
    """A batch of spoken replies; `decode` continues after the previous call."""

    def __init__(self, config: SpeechLMConfig, params: dict, batch: int, prompt: int, steps: int):
        self.config = config
        self.params = params
        self.batch = batch
        rng = np.random.default_rng(0)
        text = rng.integers(0, config.endoftext_id, (batch, prompt))
        text[:, -1] = config.sosp_id
        self.rows = jnp.asarray(np.stack([text, np.full_like(text, config.audio_pad_id)], -1), jnp.int32)
        self.capacity = prompt + steps
        # the reply never ends
        self.settings = GenerationSettings(min_new_tokens=2**30, max_new_tokens=2**30)
        self.state: GenerationState | None = None

    def prefill(self) -> jax.Array:
        self.state = None  # frees the caches before new ones are allocated
        state = new_state(self.config, self.batch, self.capacity)
        valid = jnp.ones(self.rows.shape[:2], bool)
        keys = request_keys(0, self.batch)
        state = prefill(self.params, state, self.rows, valid, self.rows.shape[1], keys, config=self.config)
        # the audio layers process the prompt in the first step
        self.state = decode_chunk(self.params, state, self.settings, 1, config=self.config)
        return self.state.filled

    def decode(self, steps: int) -> jax.Array:
        assert self.state is not None, "prefill comes first"
        self.state = decode_chunk(self.params, self.state, self.settings, steps, config=self.config)
        return self.state.filled


class Peer:
    """Qwen3ForCausalLM of the same sizes with random weights."""

    def __init__(self, config: SpeechLMConfig):
        import torch
        import transformers

        self.torch = torch
        self.device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
        sizes = transformers.Qwen3Config(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            head_dim=config.head_dim,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            num_hidden_layers=config.num_shared_layers + config.num_modality_layers,
            vocab_size=config.audio_vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        sizes.dtype = getattr(torch, config.dtype)
        with torch.device(self.device):
            self.model = transformers.AutoModelForCausalLM.from_config(sizes, dtype=sizes.dtype).eval()
        self.vocab_size = config.audio_vocab_size

    def set_batch(self, batch: int, prompt: int, steps: int) -> None:
        """Draws a prompt [batch, prompt] for the next calls."""
        self.steps = steps
        self.ids = self.torch.randint(1, self.vocab_size, (batch, prompt), device=self.device)
        self.cache: Any = None

    def prefill(self) -> None:
        with self.torch.no_grad():
            output = self.model(self.ids, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        self.next_ids = output.logits[:, -1].argmax(-1, keepdim=True)
        self._wait()

    def decode(self) -> None:
        channel = ChannelSettings()
        ids = self.torch.cat([self.ids, self.next_ids], 1)
        with self.torch.no_grad():
            self.model.generate(
                ids,
                past_key_values=self.cache,
                do_sample=True,
                temperature=channel.temperature,
                top_k=channel.top_k,
                top_p=channel.top_p,
                repetition_penalty=channel.repetition_penalty,
                max_new_tokens=self.steps,
                min_new_tokens=self.steps,
            )
        self.cache.crop(self.ids.shape[1] - self.cache.get_seq_length())  # negative: the number of entries to remove
        self._wait()

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True

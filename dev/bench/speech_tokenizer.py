"""Speech -> codes: a 30 s clip through the Whisper-VQ encoder, against the same encoder in PyTorch.

The peer is composed here of torch functions (convolutions, fused attention, exact GELU), has our random weights under
the released names, and is checked against our code before anything is timed. The reference sources do not contain the
released modelling code, so `--reference` has no effect.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dev.bench import Options, Row, compare
from moss_jax.audio.features import mel_filters
from moss_jax.convert.tables.speech_tokenizer import table
from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten
from moss_jax.speech_tokenizer.config import MOSS_SPEECH_CODEC, TINY, SpeechTokenizerConfig
from moss_jax.speech_tokenizer.encode import encode_padded
from moss_jax.speech_tokenizer.encoder import init_params
from moss_jax.speech_tokenizer.stream import START_PEAK, init_wave_state, wave_step

SIZES = {"full": MOSS_SPEECH_CODEC, "tiny": TINY}
CHUNK = 5  # codes in one step of the stream


def run(options: Options) -> Iterator[Row]:
    """Rows for a whole clip and for one step of the stream."""
    if options.size not in SIZES:
        raise MossError(f"bench speech_tokenizer: unknown size {options.size!r}, expected one of {', '.join(SIZES)}")
    config = SIZES[options.size]
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    samples = config.samples_per_segment
    wave = np.random.default_rng(0).normal(0, 0.1, (1, samples)).astype(np.float32)
    lengths = jnp.array([samples], jnp.int32)

    def ours():
        return encode_padded(config, params, jnp.asarray(wave), lengths)

    peer = _torch_peer(config, params) if options.peer else None
    if peer is not None:
        agreeing = float(np.mean(np.asarray(ours()) == peer(wave)))
        if agreeing < 0.98:  # rounding decides near ties
            raise MossError(f"bench speech_tokenizer: only {agreeing:.1%} of the codes equal the peer's, expected 98%")
    seconds = samples / config.sample_rate
    row = compare(
        f"encode {seconds:g} s of audio",
        ours,
        (lambda: peer(wave)) if peer else None,
        repeats=options.repeats,
        peer_name="torch composition",
    )
    row.note = f"ours {seconds / sorted(row.ours)[len(row.ours) // 2]:.1f} x real time"
    yield row
    yield _stream(config, params, wave, options.repeats)


def _stream(config: SpeechTokenizerConfig, params, wave: np.ndarray, repeats: int) -> Row:
    frames = CHUNK * config.frames_per_code
    piece = jnp.asarray(wave[:, : (frames - 1) * config.hop_length + config.n_fft])
    state = init_wave_state(config, 1)
    valid = jnp.array([frames], jnp.int32)
    peak = jnp.float32(START_PEAK)

    def step():
        nonlocal state
        codes, state = wave_step(config, params, piece, valid, peak, state)
        return codes

    row = compare(f"stream, a step of {CHUNK} codes", step, repeats=repeats)
    row.note = f"real time is {CHUNK / config.code_rate:.2g} s"
    return row


def _torch_peer(config: SpeechTokenizerConfig, params) -> Callable[[np.ndarray], np.ndarray] | None:
    try:
        import torch
    except ImportError:
        return None
    functional = torch.nn.functional
    named = table(config).to_theirs({path: np.asarray(leaf) for path, leaf in flatten(params).items()})
    w = {name.removeprefix("encoder."): torch.tensor(tensor) for name, tensor in named}
    filters = torch.tensor(mel_filters(config.mel))
    window = torch.hann_window(config.n_fft)
    norms = w["codebook.weight"].square().sum(-1)

    def linear(x, name):
        return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x, name):
        return functional.layer_norm(x, (config.d_model,), w[f"{name}.weight"], w[f"{name}.bias"])

    def conv(x, name, stride):
        return functional.gelu(
            functional.conv1d(functional.pad(x, (2, 0)), w[f"{name}.weight"], w[f"{name}.bias"], stride)
        )

    def layer(x, name):
        y = norm(x, f"{name}.self_attn_layer_norm")
        heads = [linear(y, f"{name}.self_attn.{part}_proj") for part in "qkv"]
        heads = [head.unflatten(-1, (config.encoder_attention_heads, -1)).transpose(1, 2) for head in heads]
        y = functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(y, f"{name}.self_attn.out_proj")
        y = functional.gelu(linear(norm(x, f"{name}.final_layer_norm"), f"{name}.fc1"))
        return x + linear(y, f"{name}.fc2")

    @torch.inference_mode()
    def encode(wave: np.ndarray) -> np.ndarray:
        spectrum = torch.stft(
            torch.tensor(wave), config.n_fft, config.hop_length, window=window, pad_mode="reflect", return_complex=True
        )
        power = spectrum[..., :-1].abs().square()
        x = torch.clamp(filters.T @ power, min=1e-10).log10()
        x = (torch.maximum(x, x.amax((1, 2), keepdim=True) - 8) + 4) / 4
        x = conv(conv(x, "conv1", 1), "conv2", 2).transpose(1, 2)
        x = x + w["embed_positions.weight"][: x.shape[1]]
        for i in range(config.num_layers):
            x = layer(x, f"layers.{i}")
        h = functional.avg_pool1d(x.transpose(1, 2), config.pooling_kernel_size).transpose(1, 2)
        return (norms - 2 * h @ w["codebook.weight"].T).argmin(-1).numpy()

    return encode

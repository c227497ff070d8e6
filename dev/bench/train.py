"""A training step of stage 1 and of stage 2, against PyTorch.

The peer is the same model composed of transformers' Qwen3 layers (SDPA attention), with torch's fused AdamW and
gradient clipping. Weights, packed batch and losses are the same; the losses are compared first. Both use the same
backend and dtype: float32 on a CPU; on an accelerator both compute in bfloat16 (the peer by autocast), with float32
for trainable and bfloat16 for frozen weights.
"""

from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np

from dev.bench import Options, Row, compare
from moss_jax.convert.tables.speech_lm import table
from moss_jax.errors import MossError
from moss_jax.nn.tree import flatten
from moss_jax.speech_lm import MOSS_SPEECH_8B, TINY, SpeechLMConfig
from moss_jax.train.optimizer import OptimizerConfig
from moss_jax.train.speech_lm.flops import peak_flops, step_flops
from moss_jax.train.speech_lm.initial import initial_split
from moss_jax.train.speech_lm.stages import STAGE_1, STAGE_2, Stage, join_params
from moss_jax.train.speech_lm.step import make_step, unrolled
from moss_jax.train.state import init_state

SIZES = {
    "full": replace(
        MOSS_SPEECH_8B,
        hidden_size=2048,
        intermediate_size=6144,
        num_attention_heads=16,
        num_shared_layers=25,
        num_modality_layers=3,
    ),  # the layers of Qwen3-1.7B
    "mid": replace(
        MOSS_SPEECH_8B,
        hidden_size=512,
        intermediate_size=1536,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_shared_layers=6,
        num_modality_layers=2,
        text_vocab_size=16384,
        audio_vocab_size=4096,
        eosp_id=4000,
        endoftext_id=16000,
        im_start_id=16001,
        im_end_id=16002,
        sosp_id=16003,
        modality_pad_id=16004,
    ),
    "tiny": TINY,
}
BATCHES = {"full": (4, 4096), "mid": (2, 512), "tiny": (8, 256)}  # rows, length
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, schedule="constant", eps=1e-6)


def run(options: Options) -> Iterator[Row]:
    """A row for each stage. The ratio of their times shows how much freezing saves."""
    if options.size not in SIZES:
        raise MossError(f"bench train: unknown size {options.size!r}, expected one of {', '.join(SIZES)}")
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    config = replace(SIZES[options.size], dtype=dtype, param_dtype=dtype, remat="none" if on_cpu else "full")
    rows, length = BATCHES[options.size]
    batch = packed_batch(config, rows, length)
    for stage in (STAGE_1, STAGE_2):
        ours = Ours(config, stage, batch)
        peer = Peer(config, stage, batch, ours) if options.peer and _importable("transformers") else None
        if peer:
            _check_same(ours.step(), peer.step(), dtype)
        name = f"{stage.name}, {rows} x {length} rows"
        row = compare(
            name, ours.step, peer.step if peer else None, repeats=options.repeats, peer_name="torch + transformers"
        )
        seconds = float(np.median(row.ours))
        row.note = f"{dtype}, {rows * length / seconds:.0f} tokens/s"
        peak = peak_flops(jax.devices()[0].device_kind)
        if peak:
            row.note += f", MFU {step_flops(config, stage, rows * length, length) / seconds / peak:.0%}"
        yield row


def packed_batch(config: SpeechLMConfig, rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Two documents a row with alternating text and speech; losses on all positions but the first of each document."""
    rng = np.random.default_rng(seed)
    at = np.arange(length)[None].repeat(rows, 0)
    cut = rng.integers(length // 4, 3 * length // 4, (rows, 1))
    positions = np.where(at < cut, at, at - cut)
    spoken = positions % 64 >= 32
    text = np.where(spoken, config.modality_pad_id, rng.integers(0, config.endoftext_id, at.shape))
    audio = np.where(spoken, rng.integers(0, config.eosp_id, at.shape), config.audio_pad_id)
    counts = positions > 0
    return {
        "grid": np.stack([text, audio], -1).astype(np.int32),
        "positions": positions.astype(np.int32),
        "segment_ids": np.where(at < cut, 1, 2).astype(np.int32),
        "source": np.zeros(at.shape, np.int32),
        "loss_weights": np.stack([counts & ~spoken, counts & spoken], -1).astype(np.float32),
    }


class Ours:
    """Our step; `step()` updates the parameters and returns the loss."""

    def __init__(self, config: SpeechLMConfig, stage: Stage, batch: dict):
        _, trainable, self.frozen = initial_split("random", stage, config, frozen_dtype=config.param_dtype)
        self.start = {} if config.dtype == "bfloat16" else join_params(trainable, self.frozen)
        self.start = jax.tree.map(np.asarray, self.start)  # a copy for the peer; the step donates the arrays
        self.state = init_state(trainable, OPTIMIZER)
        self.batch = jax.device_put(batch)
        self._step = make_step(config, stage, OPTIMIZER, unroll=unrolled(config))

    def step(self):
        self.state, metrics = self._step(self.state, self.frozen, self.batch)
        return metrics["loss"]


class Peer:
    """The same model of transformers' Qwen3 layers, under the released names."""

    def __init__(self, config: SpeechLMConfig, stage: Stage, batch: dict, ours: Ours):
        import torch
        import transformers
        from transformers.models.qwen3 import modeling_qwen3 as qwen3

        self.torch = torch
        self.config = config
        self.device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
        sizes = transformers.Qwen3Config(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            head_dim=config.head_dim,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            num_hidden_layers=config.num_shared_layers + config.num_modality_layers,
            rms_norm_eps=config.rms_norm_eps,
            vocab_size=config.text_vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            rope_theta=config.rope_theta,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )

        def block(depth):
            module = torch.nn.Module()
            module.layers = torch.nn.ModuleList(qwen3.Qwen3DecoderLayer(sizes, i) for i in range(depth))
            return module

        width = config.hidden_size
        with torch.device(self.device):
            root = torch.nn.Module()
            model = torch.nn.Module()
            model.embed_tokens = torch.nn.Embedding(config.text_vocab_size, width)
            model.audio_embed = torch.nn.Embedding(config.audio_vocab_size, width)
            model.shared_block = block(config.num_shared_layers)
            for name, vocab in (("text", config.text_vocab_size), ("audio", config.audio_vocab_size)):
                setattr(model, f"{name}_block", block(config.num_modality_layers))
                setattr(model, f"{name}_norm", qwen3.Qwen3RMSNorm(width, config.rms_norm_eps))
                setattr(root, f"{name}_lm_head", torch.nn.Linear(width, vocab, bias=False))
            root.model = model
            self.rope = qwen3.Qwen3RotaryEmbedding(sizes)
        self.root = root
        rows = table(config)
        start = flatten(ours.start)
        if start:
            tensors = {name: torch.from_numpy(np.array(value)) for name, value in rows.to_theirs(start)}
            root.load_state_dict(tensors)
        trains = set(rows.shapes(ours.state.params))
        for name, parameter in root.named_parameters():
            if name not in trains:
                parameter.requires_grad_(False)
                parameter.data = parameter.data.to(getattr(torch, config.param_dtype))
        self.trainable = [p for p in root.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trainable, OPTIMIZER.learning_rate, OPTIMIZER.betas, OPTIMIZER.eps, OPTIMIZER.weight_decay, fused=True
        )
        self.batch = {name: torch.from_numpy(x).to(self.device) for name, x in batch.items()}
        segments = self.batch["segment_ids"]
        same = segments[:, None, :, None] == segments[:, None, None, :]
        self.mask = same.tril()

    def step(self):
        torch = self.torch
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            loss = self._loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, OPTIMIZER.clip_norm)
        self.optimizer.step()
        return loss.item()  # waits for the device

    def _loss(self):
        torch = self.torch
        model = self.root.model
        grid = self.batch["grid"].long()
        spoken = (grid[..., 0] == self.config.modality_pad_id)[..., None]
        x = torch.where(spoken, model.audio_embed(grid[..., 1]), model.embed_tokens(grid[..., 0]))
        angles = self.rope(x, self.batch["positions"])

        def block(name, x):
            for layer in getattr(model, name).layers:
                y = layer(x, attention_mask=self.mask, position_embeddings=angles)
                x = y[0] if isinstance(y, tuple) else y
            return x

        x = block("shared_block", x)
        total = 0.0
        for channel, name in enumerate(channel.name for channel in self.config.channels):
            y = getattr(model, f"{name}_norm")(block(f"{name}_block", x))[:, :-1]
            logits = getattr(self.root, f"{name}_lm_head")(y).float()
            weights = self.batch["loss_weights"][:, 1:, channel]
            nll = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), grid[:, 1:, channel].flatten(), reduction="none"
            )
            total = total + (nll * weights.flatten()).sum() / weights.sum()
        return total


def _check_same(ours, theirs: float, dtype: str) -> None:
    """Compares the first losses. On an accelerator the random weights differ, so the losses are only similar."""
    if not abs(float(ours) - theirs) < (1e-4 if dtype == "float32" else 0.1) * abs(theirs):
        raise MossError(f"bench train: our loss is {float(ours):.4f}, the peer's {theirs:.4f}; expected equal losses")


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True

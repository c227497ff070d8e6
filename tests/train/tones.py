"""A tiny spoken language for tests, in which every word is a tone, and a run that learns it."""

import json
from pathlib import Path

import numpy as np

from moss_jax.audio.wave import save_audio
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig

WORDS = {"low": 300.0, "middle": 800.0, "high": 1900.0, "top": 3500.0}  # Hz
RATE = 16000  # Hz
WORD = 0.32  # seconds
MODEL = SpeechTokenizerConfig(
    sample_rate=RATE,
    n_fft=400,
    hop_length=160,
    num_mel_bins=24,
    d_model=16,
    num_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=32,
    max_source_positions=80,
    pooling_kernel_size=4,
    quantize_vocab_size=12,
    code_dim=8,
    normalize_codes=True,
    layer_norm_epsilon=1e-5,
)

CONFIG = """
from moss_jax.train import Objective, OptimizerConfig, SpeechTokenizerRun
from tests.train.tones import MODEL

RUN = SpeechTokenizerRun(
    name="tones", folder={folder!r}, model=MODEL, data=({data!r} + "/train.jsonl",),
    held_out=({data!r} + "/valid.jsonl",), objective=Objective(layers=1, mel_hidden=16, commitment_from=2),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, total_steps=40), buckets=(1.6,), batch_size=4,
    steps=4, save_every=2, evaluate_every=4, log_every=2, seed=4,
)
"""


def write_data(folder: Path) -> Path:
    random = np.random.default_rng(0)
    (folder / "audio").mkdir(parents=True)
    for name, count in (("train", 18), ("valid", 5)):
        lines = []
        for index in range(count):
            words = random.choice(list(WORDS), random.integers(1, 5))
            save_audio(folder / "audio" / f"{name}{index}.wav", wave(words, random), RATE)
            lines.append(json.dumps({"audio": f"audio/{name}{index}.wav", "text": " ".join(words).capitalize() + "."}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def wave(words, random) -> np.ndarray:
    time = np.arange(round(WORD * RATE)) / RATE
    tones = [0.3 * np.sin(2 * np.pi * WORDS[word] * time) * np.hanning(len(time)) for word in words]
    return (np.concatenate(tones) + 0.01 * random.normal(size=len(time) * len(words))).astype(np.float32)


def write_config(path: Path, data: Path, folder: Path) -> Path:
    path.write_text(CONFIG.format(data=str(data), folder=str(folder)))
    return path

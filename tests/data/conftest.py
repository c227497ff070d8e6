import json

import numpy as np
import pytest

from moss_jax.data import Example, write_examples
from moss_jax.data.formats import speech, text
from moss_jax.speech_lm import TINY


def random_example(random: np.random.Generator, rows: int, name: str = "") -> Example:
    """A document of `rows` rows, 3 at least: written, spoken or both, some of it not scored."""
    kind = random.integers(3) if rows > 6 else 0
    if kind == 0:
        grid, weights = text(random.integers(0, TINY.endoftext_id, rows - 1), TINY)
    elif kind == 1:
        grid, weights = speech(random.integers(0, TINY.eosp_id, rows - 3), TINY)
    else:
        spoken, _ = speech(random.integers(0, TINY.eosp_id, rows - 6), TINY)
        written, _ = text(random.integers(0, TINY.endoftext_id, 2), TINY)
        grid = np.concatenate([written, spoken])
        weights = np.ones_like(grid, np.float32) * (grid != [TINY.modality_pad_id, TINY.audio_pad_id])
        weights[: random.integers(1, rows)] = 0
    assert len(grid) == rows
    return Example(grid, weights.astype(np.float32), name)


def numbered(number: int, rows: int) -> Example:
    """A document that says in each row which one it is (three digits to the base 280) and which row."""
    digits = [number // 280, number % 280]
    ids = np.resize(np.array([*digits, 0]), rows)
    ids[2::3] = np.arange(len(ids[2::3])) % 280
    grid = np.stack([ids, np.full(rows, TINY.audio_pad_id)], 1).astype(np.int32)
    weights = np.zeros((rows, 2), np.float32)
    weights[1:, 0] = 1
    return Example(grid, weights, str(number))


@pytest.fixture(scope="session")
def two_sources(tmp_path_factory):
    """Folders of 90 short and 40 longer documents, in several shards; and the documents."""
    folder = tmp_path_factory.mktemp("sources")
    random = np.random.default_rng(0)
    sources = {}
    for name, count, longest in (("short", 90, 12), ("long", 40, 70)):
        examples = [numbered(i + 1000 * (name == "long"), n) for i, n in enumerate(random.integers(2, longest, count))]
        write_examples(folder / name, examples, TINY, examples_per_shard=32)
        sources[name] = (folder / name, examples)
    return sources


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny random wav2vec 2.0 with a CTC head for Latin capitals."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("ctc")
    vocabulary = {"<pad>": 0, "|": 1} | {letter: 2 + i for i, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ'")}
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
    )
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=16000, do_normalize=False).save_pretrained(
        folder
    )
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return folder

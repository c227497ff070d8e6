"""Small released checkpoints for the tests: names and shapes of the real ones, random values, written by the
libraries that write the real ones."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from moss_jax.convert.language_model import released_config
from moss_jax.convert.tables import qwen3 as qwen3_table
from moss_jax.convert.tables import speech_lm as speech_lm_table
from moss_jax.convert.text_tokenizer import write_text_tokenizer
from moss_jax.speech_lm import model_shapes
from moss_jax.speech_lm.config import TINY, SpeechLMConfig


def random_tensors(shapes, dtype=ml_dtypes.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_shards(folder: Path, tensors, count):
    """Shards and index as the safetensors library and huggingface_hub write them."""
    names = list(tensors)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    groups = [names[i::count] for i in range(count)]
    for file, group in zip(files, groups, strict=True):
        save_file({name: tensors[name] for name in group}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_tensors(folder: Path):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_tensors(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape), name
        assert ours[name].tobytes() == theirs[name].tobytes(), name


def write_language_model(folder: Path, config: SpeechLMConfig = TINY, shards=3, seed=0):
    """A released language model; returns its tensors."""
    folder.mkdir(parents=True)
    shapes = speech_lm_table.table(config).shapes(model_shapes(config))
    tensors = random_tensors(shapes, seed=seed)
    write_shards(folder, tensors, shards)
    write_text_tokenizer(folder / "tokenizer.json", config)
    released = released_config(config) | {"initializer_range": 0.02, "auto_map": {"AutoModel": "modeling.Moss"}}
    for key in ("endoftext_token_id", "im_start_token_id", "im_end_token_id"):
        del released[key]
    (folder / "config.json").write_text(json.dumps(released))
    (folder / "modeling.py").write_text("raise SystemExit('a checkpoint ran its code')\n")
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    return tensors


def write_qwen3(folder: Path, tied: bool, depth=5, vocab=400, shards=2, seed=0, dtype="bfloat16"):
    """A plain Qwen3; returns its tensors and the text tokenizer's config."""
    folder.mkdir(parents=True)
    config = SpeechLMConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_shared_layers=0,
        num_modality_layers=depth,
        text_vocab_size=vocab,
        audio_vocab_size=0,
    )
    shapes = dict(model_shapes(config))
    if tied:
        del shapes["text/head/kernel"]
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    tensors = random_tensors(qwen3_table.table(config).shapes(shapes), kind, seed)
    write_shards(folder, tensors, shards)
    write_text_tokenizer(folder / "tokenizer.json", TINY)
    values = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": depth,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_theta": 1000000,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return tensors, config


def write_codec(folder: Path, spelling=None, seed=0):
    """A released codec, small; returns {file: tensors}. Needs torch and onnx."""
    import torch

    from moss_jax.convert.codec_config import released_tokenizer_config, released_yaml
    from moss_jax.convert.tables import flow as flow_table
    from moss_jax.convert.tables import speech_tokenizer as tokenizer_table
    from moss_jax.convert.tables import vocoder as vocoder_table
    from moss_jax.speech_decoder.config import TINY as DECODER
    from moss_jax.speech_decoder.flow.model import flow_shapes
    from moss_jax.speech_decoder.vocoder import vocoder_shapes
    from moss_jax.speech_tokenizer.config import TINY as TOKENIZER
    from moss_jax.speech_tokenizer.encoder import encoder_shapes
    from tests.convert.campplus_torch import export, random_campplus

    (folder / "flow").mkdir(parents=True)
    shapes = tokenizer_table.table(TOKENIZER).shapes(encoder_shapes(TOKENIZER))
    layer = {f"encoder.layers.{TOKENIZER.num_layers}.fc1.bias": (64,), "encoder.layer_norm.weight": (32,)}
    more = layer | {"encoder.ema_count": (96,), "encoder.ema_weight": (96, 32), "decoder.layers.0.fc1.bias": (3,)}
    files = {"model.safetensors": random_tensors(shapes | more, np.float32, seed)}
    save_file(files["model.safetensors"], folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(released_tokenizer_config(TOKENIZER) | {"vocab_size": 51866}))
    (folder / "preprocessor_config.json").write_text('{"feature_size": 128}')
    table = flow_table.table(DECODER.flow)
    shapes = flow_shapes(DECODER.flow)
    for i, name in enumerate(("flow.pt", "flow-chunk-5.pt", "flow-chunk-25.pt")):
        files[name] = random_tensors(table.shapes(shapes), np.float32, seed + i)
        extras = {"epoch": 3, "step": 1000 + i} if i < 2 else {}
        state = {key: torch.from_numpy(value) for key, value in files[name].items()}
        torch.save(state | extras, folder / "flow" / name)
    table = vocoder_table.table(DECODER.vocoder, spelling or vocoder_table.Spelling())
    files["hift.pt"] = random_tensors(table.shapes(vocoder_shapes(DECODER.vocoder)), np.float32, seed)
    torch.save({key: torch.from_numpy(value) for key, value in files["hift.pt"].items()}, folder / "flow/hift.pt")
    (folder / "flow/config.yaml").write_text(released_yaml(DECODER.flow, DECODER.vocoder))
    (folder / "flow/other.pt").write_bytes(b"nobody knows this file")
    export(random_campplus(), folder / "flow/campplus.onnx", folded=True)
    return files

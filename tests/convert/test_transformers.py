"""Exchange with the transformers library, if it is installed: we read its Qwen3, and it reads ours."""

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from moss_jax.checkpoint import load_tree  # noqa: E402
from moss_jax.convert.qwen3 import export_qwen3, import_qwen3  # noqa: E402
from moss_jax.convert.text_tokenizer import write_text_tokenizer  # noqa: E402
from moss_jax.speech_lm import model_shapes  # noqa: E402
from moss_jax.speech_lm.config import TINY  # noqa: E402
from moss_jax.speech_lm.model import LayerSplitModel  # noqa: E402
from tests.convert.checkpoints import read_tensors, same_tensors  # noqa: E402

LENGTH = 256  # positions; a wrong rotary embedding is not seen in a few


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_qwen3_written_by_transformers(tmp_path, tied):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        rope_theta=1e6,
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "qwen", max_shard_size="60KB")
    write_text_tokenizer(tmp_path / "qwen" / "tokenizer.json", TINY)
    assert len(list((tmp_path / "qwen").glob("*.safetensors"))) > 1
    split = import_qwen3(tmp_path / "qwen", tmp_path / "system", 2, codes=80)
    assert split.rope_theta == 1e6
    ids = np.random.default_rng(0).integers(0, 280, (2, LENGTH))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    params = load_tree(tmp_path / "system" / "transformer", model_shapes(split))
    grid = np.stack([ids, np.full_like(ids, split.audio_pad_id)], -1)
    positions = np.broadcast_to(np.arange(LENGTH), (2, LENGTH))
    text, _ = LayerSplitModel(split).apply({"params": params}, grid, positions)
    np.testing.assert_allclose(np.asarray(text), expected[..., : split.text_vocab_size], atol=2e-5)

    (tmp_path / "again").mkdir()
    export_qwen3(tmp_path / "system", tmp_path / "again")
    same_tensors(read_tensors(tmp_path / "again"), read_tensors(tmp_path / "qwen"))
    again = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.from_numpy(ids)).logits.numpy(), expected)

"""Name table of Qwen/Qwen3-*: 11 tensors a layer and three more. With tied embeddings there is no `lm_head.weight`.

In our parameter tree a plain Qwen3 is a layer-split model with `num_shared_layers=0` and `audio_vocab_size=0`.
"""

from moss_jax.convert.table import LINEAR, NameTable, Row, prefixed
from moss_jax.convert.tables.speech_lm import layer_rows
from moss_jax.speech_lm.config import SpeechLMConfig


def table(config: SpeechLMConfig) -> NameTable:
    """The name table of a plain Qwen3. For tied embeddings the parameter tree has no 'text/head/kernel'."""
    rows = (
        Row("model.embed_tokens.weight", "text/embed/embedding"),
        Row("model.norm.weight", "text/norm/scale"),
        Row("lm_head.weight", "text/head/kernel", LINEAR),
    )
    return NameTable(rows + prefixed(layer_rows(config), "model.layers.{layer}.", "text/layers/"))

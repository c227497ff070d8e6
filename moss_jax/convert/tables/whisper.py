"""Name table of a Whisper of Hugging Face, as the initial weights of a speech tokenizer in training.

The first layers of its encoder come before the quantizer ("model.encoder.layers.0."), the others after it;
`convert.whisper` renames those to "model.encoder.after.0." before it uses this table.
"""

from moss_jax.convert.table import CONV1D, LINEAR, NameTable, Row, heads_bias, heads_in, heads_out, prefixed


def table(heads: int) -> NameTable:
    """The output projection is tied to the token embedding and therefore unused."""
    attention = (
        Row("q_proj.weight", "q/kernel", heads_out(heads)),
        Row("q_proj.bias", "q/bias", heads_bias(heads)),
        Row("k_proj.weight", "k/kernel", heads_out(heads)),
        Row("v_proj.weight", "v/kernel", heads_out(heads)),
        Row("v_proj.bias", "v/bias", heads_bias(heads)),
        Row("out_proj.weight", "o/kernel", heads_in(heads)),
        Row("out_proj.bias", "o/bias"),
    )
    layer = (
        *prefixed(attention, "self_attn."),
        *_norm("self_attn_layer_norm", "attention_norm"),
        Row("fc1.weight", "up/kernel", LINEAR),
        Row("fc1.bias", "up/bias"),
        Row("fc2.weight", "down/kernel", LINEAR),
        Row("fc2.bias", "down/bias"),
        *_norm("final_layer_norm", "mlp_norm"),
    )
    cross = (*prefixed(attention, "encoder_attn.", "cross_"), *_norm("encoder_attn_layer_norm", "cross_norm"))
    encoder = (
        Row("conv1.weight", "encoder/conv1/kernel", CONV1D),
        Row("conv1.bias", "encoder/conv1/bias"),
        Row("conv2.weight", "encoder/conv2/kernel", CONV1D),
        Row("conv2.bias", "encoder/conv2/bias"),
        Row("embed_positions.weight", "encoder/positions"),
        *prefixed(layer, "layers.{layer}.", "encoder/layers/"),
        *prefixed(layer, "after.{layer}.", "head/layers/"),
        *_norm("layer_norm", "head/norm"),
    )
    decoder = (
        Row("embed_tokens.weight", "head/embed/embedding"),
        Row("embed_positions.weight", "head/positions"),
        *prefixed((*layer, *cross), "layers.{layer}.", "head/decoder_layers/"),
        *_norm("layer_norm", "head/decoder_norm"),
    )
    rows = (*prefixed(encoder, "model.encoder."), *prefixed(decoder, "model.decoder."))
    return NameTable(rows, (r"proj_out\.weight",))


def _norm(name: str, path: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", f"{path}/scale"), Row(f"{name}.bias", f"{path}/bias")

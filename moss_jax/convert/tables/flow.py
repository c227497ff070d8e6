"""Name table of flow.pt, flow-chunk-5.pt and flow-chunk-25.pt: 1121 tensors and two counters."""

from moss_jax.convert.table import (
    CONV1D,
    CONV1X1,
    LINEAR,
    SAME,
    NameTable,
    Row,
    heads_bias,
    heads_in,
    heads_out,
    prefixed,
)
from moss_jax.speech_decoder.flow.config import FlowConfig


def _linear(name: str, path: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", f"{path}/kernel", LINEAR), Row(f"{name}.bias", f"{path}/bias")


def _conv(name: str, path: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", f"{path}/kernel", CONV1D), Row(f"{name}.bias", f"{path}/bias")


def _conv1x1(name: str, path: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", f"{path}/kernel", CONV1X1), Row(f"{name}.bias", f"{path}/bias")


def _norm(name: str, path: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", f"{path}/scale"), Row(f"{name}.bias", f"{path}/bias")


def encoder_rows(config: FlowConfig) -> tuple[Row, ...]:
    """The rows of the encoder, without the prefix `encoder.`."""
    heads = config.encoder.num_heads
    layer = (
        *(
            row
            for name in ("q", "k", "v")
            for row in (
                Row(f"self_attn.linear_{name}.weight", f"attention/{name}/kernel", heads_out(heads)),
                Row(f"self_attn.linear_{name}.bias", f"attention/{name}/bias", heads_bias(heads)),
            )
        ),
        Row("self_attn.linear_out.weight", "attention/o/kernel", heads_in(heads)),
        Row("self_attn.linear_out.bias", "attention/o/bias"),
        Row("self_attn.linear_pos.weight", "attention/position", heads_out(heads)),
        Row("self_attn.pos_bias_u", "attention/bias_u", SAME),
        Row("self_attn.pos_bias_v", "attention/bias_v", SAME),
        *_linear("feed_forward.w_1", "up"),
        *_linear("feed_forward.w_2", "down"),
        *_norm("norm_mha", "attention_norm"),
        *_norm("norm_ff", "mlp_norm"),
    )
    return (
        *_linear("embed.out.0", "embedding/linear"),
        *_norm("embed.out.1", "embedding/norm"),
        *_linear("up_embed.out.0", "up_embedding/linear"),
        *_norm("up_embed.out.1", "up_embedding/norm"),
        *_conv("pre_lookahead_layer.conv1", "lookahead"),
        *_conv("pre_lookahead_layer.conv2", "lookahead_out"),
        *_conv("up_layer.conv", "upsample"),
        *_norm("after_norm", "norm"),
        *prefixed(layer, "encoders.{layer}.", "layers/"),
        *prefixed(layer, "up_encoders.{layer}.", "up_layers/"),
    )


def estimator_rows(config: FlowConfig, estimator: str = "estimator/", time: str = "time/") -> tuple[Row, ...]:
    """The rows of the estimator, without the prefix `decoder.estimator.`.

    Args:
        estimator, time: prefixes of the paths of the estimator and of the time embedding.
    """
    heads = config.estimator.num_heads
    block = (
        *(Row(f"attn1.to_{name}.weight", f"{name}/kernel", heads_out(heads)) for name in ("q", "k", "v")),
        Row("attn1.to_out.0.weight", "o/kernel", heads_in(heads)),
        Row("attn1.to_out.0.bias", "o/bias"),
        *_linear("ff.net.0.proj", "up"),
        *_linear("ff.net.2", "down"),
        *_norm("norm1", "attention_norm"),
        *_norm("norm3", "mlp_norm"),
    )
    rows = [*_linear("time_mlp.linear_1", f"{time}linear_1"), *_linear("time_mlp.linear_2", f"{time}linear_2")]
    for name, ours in (("down_blocks.0", "down"), ("mid_blocks.{stage}", "mid"), ("up_blocks.0", "up")):
        rows += _linear(f"{name}.0.mlp.1", f"{time}{ours}")
        residual = (
            *_conv("block1.block.0", "block1/conv"),
            *_norm("block1.block.2", "block1/norm"),
            *_conv("block2.block.0", "block2/conv"),
            *_norm("block2.block.2", "block2/norm"),
            *_conv1x1("res_conv", "skip"),
        )
        rows += prefixed(residual, f"{name}.0.", f"{estimator}{ours}/residual/")
        rows += prefixed(block, f"{name}.1.{{block}}.", f"{estimator}{ours}/blocks/")
        if ours != "mid":
            rows += _conv(f"{name}.2", f"{estimator}{ours}_out")
    rows += _conv("final_block.block.0", f"{estimator}final/conv")
    rows += _norm("final_block.block.2", f"{estimator}final/norm")
    rows += _conv1x1("final_proj", f"{estimator}final_out")
    return tuple(rows)


def table(config: FlowConfig) -> NameTable:
    """The name table; paths are those of `FlowModel`. The training counters are unused and carried."""
    return NameTable(
        (
            Row("input_embedding.weight", "codes/embedding"),
            *_linear("spk_embed_affine_layer", "speaker"),
            *_linear("encoder_proj", "mu"),
            *prefixed(encoder_rows(config), "encoder.", "encoder/"),
            *prefixed(estimator_rows(config), "decoder.estimator."),
        ),
        carried=("epoch", "step"),
    )

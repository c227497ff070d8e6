"""Names of `hift.pt`, the HiFT vocoder of the released codec.

Two things differ between files of the same model: how weight norm is spelled (`X.parametrizations.weight.original0/1`
or the older `X.weight_g`, `X.weight_v`) and whether `generator.` stands before every name. `spelling` finds both from
the names of a file; an export hands the same back to `table`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from moss_jax.convert.table import CONV1D, CONV_TRANSPOSE1D, LINEAR, SAME, NameTable, Row, Transform
from moss_jax.speech_decoder.vocoder import VocoderConfig

GAIN = Transform(lambda x: x.reshape(x.shape[0]), lambda x: x.reshape(x.shape[0], 1, 1))  # torch [channels, 1, 1]


@dataclass(frozen=True)
class Spelling:
    """How a file spells the names: what stands before each, and the weight norm suffixes of g and v."""

    prefix: str = ""
    g: str = "parametrizations.weight.original0"
    v: str = "parametrizations.weight.original1"


def spelling(names: Iterable[str]) -> Spelling:
    """The spelling of a file with these tensor names."""
    names = list(names)
    prefix = "generator." if any(name.startswith("generator.") for name in names) else ""
    if any(name.endswith(".weight_v") for name in names):
        return Spelling(prefix, "weight_g", "weight_v")
    return Spelling(prefix)


def table(config: VocoderConfig, spelling: Spelling = Spelling()) -> NameTable:
    """The name table for parameters with weight norm in its two parts (`config.weight_norm`)."""

    def conv(name: str, path: str, transform: Transform = CONV1D) -> list[Row]:
        return [
            Row(f"{spelling.prefix}{name}.{spelling.g}", f"{path}/g", GAIN),
            Row(f"{spelling.prefix}{name}.{spelling.v}", f"{path}/v", transform),
            Row(f"{spelling.prefix}{name}.bias", f"{path}/bias"),
        ]

    def plain(name: str, path: str, transform: Transform) -> list[Row]:
        return [
            Row(f"{spelling.prefix}{name}.weight", f"{path}/kernel", transform),
            Row(f"{spelling.prefix}{name}.bias", f"{path}/bias"),
        ]

    rows = [
        *plain("m_source.l_linear", "merge", LINEAR),
        *plain("f0_predictor.classifier", "f0_classifier", LINEAR),
        *conv("conv_pre", "conv_pre"),
        *conv("conv_post", "conv_post"),
        *conv("ups.{stage}", "ups_{stage}", CONV_TRANSPOSE1D),
        *plain("source_downs.{stage}", "source_downs_{stage}", CONV1D),
    ]
    for layer in range(config.f0_layers):
        rows += conv(f"f0_predictor.condnet.{2 * layer}", f"f0_conv_{layer}")
    for kind in ("resblocks", "source_resblocks"):
        for i in (1, 2):
            rows += conv(f"{kind}.{{block}}.convs{i}.{{layer}}", f"{kind}_{{block}}/conv{i}")
            rows.append(
                Row(
                    f"{spelling.prefix}{kind}.{{block}}.activations{i}.{{layer}}.alpha",
                    f"{kind}_{{block}}/alpha{i}",
                    SAME,
                )
            )
    return NameTable(tuple(rows))

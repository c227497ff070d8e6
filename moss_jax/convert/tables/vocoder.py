"""Name table of `hift.pt`, the HiFT vocoder of the released codec.

Files of the same model differ in two ways: the names of weight norm (`X.parametrizations.weight.original0/1`, or
`X.weight_g` and `X.weight_v` of older PyTorch versions), and whether every name starts with `generator.`. `spelling`
detects both; an export writes the names in the same way.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from moss_jax.convert.table import CONV1D, CONV_TRANSPOSE1D, LINEAR, SAME, NameTable, Row, Transform
from moss_jax.speech_decoder.vocoder import VocoderConfig

GAIN = Transform("channels 1 1", "channels")


@dataclass(frozen=True)
class Spelling:
    """How a file spells its names: the prefix of all names, and the suffixes of g and v of weight norm."""

    prefix: str = ""
    g: str = "parametrizations.weight.original0"
    v: str = "parametrizations.weight.original1"


def spelling(names: Iterable[str]) -> Spelling:
    """Detects the spelling from the tensor names of a file."""
    names = list(names)
    prefix = "generator." if any(name.startswith("generator.") for name in names) else ""
    if any(name.endswith(".weight_v") for name in names):
        return Spelling(prefix, "weight_g", "weight_v")
    return Spelling(prefix)


def table(config: VocoderConfig, spelling: Spelling = Spelling()) -> NameTable:
    """The name table for parameters with weight norm as g and v (`config.weight_norm`)."""

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

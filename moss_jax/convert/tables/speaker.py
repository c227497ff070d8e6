"""Name table of CAM++, with the names of 3D-Speaker's PyTorch module."""

from moss_jax.convert.table import CONV1D, CONV1X1, CONV2D, NameTable, Row, Transform
from moss_jax.speech_decoder.speaker import SpeakerConfig


def table(config: SpeakerConfig) -> NameTable:
    """The name table. The counters of batch normalization are unused and carried."""
    rows: list[Row] = []

    def norm(name: str, path: str, affine: bool = True) -> None:
        rows.extend((Row(f"{name}.running_mean", f"{path}/mean"), Row(f"{name}.running_var", f"{path}/var")))
        if affine:
            rows.extend((Row(f"{name}.weight", f"{path}/scale"), Row(f"{name}.bias", f"{path}/bias")))

    def conv(name: str, path: str, transform: Transform) -> None:
        rows.append(Row(f"{name}.weight", f"{path}/kernel", transform))

    for i in (1, 2):
        conv(f"head.conv{i}", f"head/conv{i}", CONV2D)
        norm(f"head.bn{i}", f"head/norm{i}")
    for group, blocks in enumerate(config.head_blocks, 1):
        for block in range(blocks):
            name = f"head.layer{group}.{block}"
            path = f"head/layer{group}_{block}"
            for i in (1, 2):
                conv(f"{name}.conv{i}", f"{path}/conv{i}", CONV2D)
                norm(f"{name}.bn{i}", f"{path}/norm{i}")
            if block == 0:
                conv(f"{name}.shortcut.0", f"{path}/shortcut", CONV2D)
                norm(f"{name}.shortcut.1", f"{path}/shortcut_norm")
    conv("xvector.tdnn.linear", "tdnn", CONV1D)
    norm("xvector.tdnn.nonlinear.batchnorm", "tdnn_norm")
    for block, layers in enumerate(config.dense_layers, 1):
        for layer in range(1, layers + 1):
            name = f"xvector.block{block}.tdnnd{layer}"
            path = f"block{block}_{layer}"
            norm(f"{name}.nonlinear1.batchnorm", f"{path}/norm1")
            conv(f"{name}.linear1", f"{path}/inner", CONV1X1)
            norm(f"{name}.nonlinear2.batchnorm", f"{path}/norm2")
            conv(f"{name}.cam_layer.linear_local", f"{path}/local", CONV1D)
            for i in (1, 2):
                conv(f"{name}.cam_layer.linear{i}", f"{path}/context{i}", CONV1X1)
                rows.append(Row(f"{name}.cam_layer.linear{i}.bias", f"{path}/context{i}/bias"))
        norm(f"xvector.transit{block}.nonlinear.batchnorm", f"transit{block}_norm")
        conv(f"xvector.transit{block}.linear", f"transit{block}", CONV1X1)
    norm("xvector.out_nonlinear.batchnorm", "out_norm")
    conv("xvector.dense.linear", "dense", CONV1X1)
    norm("xvector.dense.nonlinear.batchnorm", "dense_norm", affine=False)
    return NameTable(tuple(rows), (r".*\.num_batches_tracked",))

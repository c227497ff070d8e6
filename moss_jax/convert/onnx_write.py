"""Writes an ONNX graph of CAM++, for systems whose speaker network was not imported from one.

Sources: the ONNX operator specification (opset 17); 3D-Speaker's CAM++ for the network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.convert.onnx_speaker import BN_INPUTS, EPSILON, import_onnx
from moss_jax.convert.stream import TensorSource
from moss_jax.files import atomic_file
from moss_jax.speech_decoder.speaker import SpeakerConfig

OPSET = 17
CHANNEL_AXIS = 1  # of activations [B, C, T]


class _Graph:
    """Collects nodes in the order of computation; every method adds nodes and returns the name of the result."""

    def __init__(self, onnx: Any, source: TensorSource) -> None:
        self.onnx = onnx
        self.source = source
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._constants: set[str] = set()

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in self._constants:
            self._constants.add(name)
            self.initializers.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def tensor(self, name: str) -> str:
        return self.constant(name, self.source.read(name))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"t{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def ints(self, *values: int) -> str:
        return self.constant("ints_" + "_".join(map(str, values)).replace("-", "minus"), np.array(values, np.int64))

    def conv(self, x: str, name: str, bias: bool = False, **attributes: Any) -> str:
        weights = [self.tensor(f"{name}.weight"), *([self.tensor(f"{name}.bias")] if bias else [])]
        return self.op("Conv", x, *weights, **attributes)

    def norm(self, x: str, name: str, relu: bool = True, affine: bool = True) -> str:
        parts = []
        for part in BN_INPUTS:
            if affine or part.startswith("running"):
                parts.append(self.tensor(f"{name}.{part}"))
            else:
                like = self.source.read(f"{name}.running_mean")
                value = np.ones_like(like) if part == "weight" else np.zeros_like(like)
                parts.append(self.constant(f"{name}.{part}", value))
        y = self.op("BatchNormalization", x, *parts, epsilon=EPSILON)
        return self.op("Relu", y) if relu else y

    def mean(self, x: str, axes: Sequence[int], keep: int = 1) -> str:
        return self.op("ReduceMean", x, axes=list(axes), keepdims=keep)


def write_speaker_graph(path: str | Path, source: TensorSource, config: SpeakerConfig) -> None:
    """Writes `campplus.onnx`: features [B, T, feat_dim] in, embedding [B, embedding_size] out."""
    onnx = import_onnx()
    graph = _Graph(onnx, source)
    x = graph.op("Unsqueeze", graph.op("Transpose", "input", perm=[0, 2, 1]), graph.ints(1))
    x = _head(graph, x, config)
    x = graph.norm(graph.conv(x, "xvector.tdnn.linear", strides=[2], pads=[2, 2]), "xvector.tdnn.nonlinear.batchnorm")
    for block, layers in enumerate(config.dense_layers, 1):
        for layer in range(1, layers + 1):
            x = _dense(graph, x, f"xvector.block{block}.tdnnd{layer}", config.dense_dilations[block - 1], config)
        name = f"xvector.transit{block}"
        x = graph.conv(graph.norm(x, f"{name}.nonlinear.batchnorm"), f"{name}.linear")
    x = graph.norm(x, "xvector.out_nonlinear.batchnorm")
    x = graph.op("Unsqueeze", graph.op("Concat", *_statistics(graph, x), axis=CHANNEL_AXIS), graph.ints(2))
    x = graph.norm(graph.conv(x, "xvector.dense.linear"), "xvector.dense.nonlinear.batchnorm", relu=False, affine=False)
    x = graph.op("Squeeze", x, graph.ints(2))
    graph.nodes[-1].output[0] = "output"
    value = onnx.helper.make_tensor_value_info
    onnx_graph = onnx.helper.make_graph(
        graph.nodes,
        "campplus",
        [value("input", onnx.TensorProto.FLOAT, ["B", "T", config.num_mel_bins])],
        [value("output", onnx.TensorProto.FLOAT, ["B", config.embedding_size])],
        graph.initializers,
    )
    model = onnx.helper.make_model(onnx_graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    with atomic_file(path) as part:
        part.write_bytes(model.SerializeToString())


def _head(graph: _Graph, x: str, config: SpeakerConfig) -> str:
    """[B, 1, F, T] -> [B, C * F / 8, T]."""
    same: dict[str, Any] = {"pads": [1, 1, 1, 1]}  # keeps height and width at stride 1
    x = graph.norm(graph.conv(x, "head.conv1", **same), "head.bn1")
    for group, blocks in enumerate(config.head_blocks, 1):
        for block in range(blocks):
            name = f"head.layer{group}.{block}"
            strides = [1 if block else 2, 1]
            y = graph.norm(graph.conv(x, f"{name}.conv1", strides=strides, **same), f"{name}.bn1")
            y = graph.norm(graph.conv(y, f"{name}.conv2", **same), f"{name}.bn2", relu=False)
            if block == 0:
                x = graph.norm(graph.conv(x, f"{name}.shortcut.0", strides=strides), f"{name}.shortcut.1", relu=False)
            x = graph.op("Relu", graph.op("Add", y, x))
    x = graph.norm(graph.conv(x, "head.conv2", strides=[2, 1], **same), "head.bn2")
    flat = config.head_channels * config.num_mel_bins // 2 ** (len(config.head_blocks) + 1)
    return graph.op("Reshape", x, graph.ints(0, flat, -1))


def _dense(graph: _Graph, x: str, name: str, dilation: int, config: SpeakerConfig) -> str:
    y = graph.conv(graph.norm(x, f"{name}.nonlinear1.batchnorm"), f"{name}.linear1")
    y = graph.norm(y, f"{name}.nonlinear2.batchnorm")
    size = config.segment_frames
    cam = f"{name}.cam_layer"
    local = graph.conv(y, f"{cam}.linear_local", dilations=[dilation], pads=[dilation, dilation])
    pooled = graph.op("AveragePool", y, kernel_shape=[size], strides=[size], ceil_mode=1, count_include_pad=0)
    repeated = graph.op("Expand", graph.op("Unsqueeze", pooled, graph.ints(3)), graph.ints(1, 1, 1, size))
    repeated = graph.op("Reshape", repeated, graph.ints(0, 0, -1))
    length = graph.op("Slice", graph.op("Shape", y), graph.ints(2), graph.ints(3))
    context = graph.op("Add", graph.mean(y, [2]), graph.op("Slice", repeated, graph.ints(0), length, graph.ints(2)))
    gate = graph.conv(graph.op("Relu", graph.conv(context, f"{cam}.linear1", bias=True)), f"{cam}.linear2", bias=True)
    return graph.op("Concat", x, graph.op("Mul", local, graph.op("Sigmoid", gate)), axis=CHANNEL_AXIS)


def _statistics(graph: _Graph, x: str) -> tuple[str, str]:
    """Mean and unbiased standard deviation over time."""
    centred = graph.op("Sub", x, graph.mean(x, [2]))
    squares = graph.op("ReduceSum", graph.op("Mul", centred, centred), graph.ints(2), keepdims=0)
    frames = graph.op("Cast", graph.op("Slice", graph.op("Shape", x), graph.ints(2), graph.ints(3)), to=1)
    variance = graph.op("Div", squares, graph.op("Sub", frames, graph.constant("one", np.ones(1, np.float32))))
    return graph.mean(x, [2], keep=0), graph.op("Sqrt", variance)

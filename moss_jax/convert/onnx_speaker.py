"""Reads and writes the speaker network's ONNX file (`campplus.onnx`), with the tensor names of the 3D-Speaker module.

An exporter may change tensor names, or fold a BatchNorm into the weight and bias of the convolution before it. Names
are therefore not reliable, but the order of the operators is fixed by the network: the operators of the graph are
compared one by one with the layers of CAM++, and every shape is checked. Nothing in the file is executed.

A folded BatchNorm is represented by one that only adds the folded bias: scale 1, mean 0, and a variance that is 1
together with epsilon. Sources: the ONNX operator specification; 3D-Speaker's CAM++ for the layers.
"""

import graphlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.convert.stream import MemoryTensors, TensorSource
from moss_jax.documents import short
from moss_jax.errors import MossError
from moss_jax.files import atomic_file
from moss_jax.speech_decoder.speaker import SpeakerConfig

MIN_INPUTS = {"Identity": 1, "Conv": 2, "Gemm": 2, "BatchNormalization": 5}
EPSILON = 1e-5  # of every BatchNorm
SEGMENT_FRAMES = 100  # length of a segment mean if the graph has no pooling operator to read it from
BN_INPUTS = ("weight", "bias", "running_mean", "running_var")
MAX_FRAMES = 10_000  # limit of a dilation or a segment mean
# TensorProto data types of parameters and shapes: bytes of an element, and the field that holds it without raw data.
STORED_TYPES = {
    1: (4, "float_data"),  # FLOAT
    6: (4, "int32_data"),  # INT32
    7: (8, "int64_data"),  # INT64
    10: (2, "int32_data"),  # FLOAT16
    11: (8, "double_data"),  # DOUBLE
    16: (2, "int32_data"),  # BFLOAT16
}
UNIT_VARIANCE = np.float32(1 - EPSILON)


@dataclass(frozen=True)
class Operator:
    """An operator of the network: a convolution (with or without bias) or a BatchNorm."""

    name: str
    is_conv: bool
    bias: bool = False


def operators(head_blocks: tuple[int, ...], dense_layers: tuple[int, ...]) -> Iterator[Operator]:
    """The convolutions and BatchNorms of CAM++ in the order in which they are computed."""
    yield from _conv_bn("head.conv1", "head.bn1")
    for group, blocks in enumerate(head_blocks, 1):
        for block in range(blocks):
            name = f"head.layer{group}.{block}"
            yield from _conv_bn(f"{name}.conv1", f"{name}.bn1")
            yield from _conv_bn(f"{name}.conv2", f"{name}.bn2")
            if block == 0:
                yield from _conv_bn(f"{name}.shortcut.0", f"{name}.shortcut.1")
    yield from _conv_bn("head.conv2", "head.bn2")
    yield from _conv_bn("xvector.tdnn.linear", "xvector.tdnn.nonlinear.batchnorm")
    for block, layers in enumerate(dense_layers, 1):
        for layer in range(1, layers + 1):
            name = f"xvector.block{block}.tdnnd{layer}"
            yield Operator(f"{name}.nonlinear1.batchnorm", False)
            yield from _conv_bn(f"{name}.linear1", f"{name}.nonlinear2.batchnorm")
            yield Operator(f"{name}.cam_layer.linear_local", True)
            yield Operator(f"{name}.cam_layer.linear1", True, bias=True)
            yield Operator(f"{name}.cam_layer.linear2", True, bias=True)
        yield Operator(f"xvector.transit{block}.nonlinear.batchnorm", False)
        yield Operator(f"xvector.transit{block}.linear", True)
    yield Operator("xvector.out_nonlinear.batchnorm", False)
    yield from _conv_bn("xvector.dense.linear", "xvector.dense.nonlinear.batchnorm")


def _conv_bn(conv: str, bn: str) -> Iterator[Operator]:
    yield Operator(conv, True)
    yield Operator(bn, False)


def import_onnx() -> Any:
    """The onnx module. Raises MossError if it is not installed."""
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError:
        raise MossError(
            "onnx is not installed, but .onnx files need it: pip install 'moss-jax[convert]' (only for converting)"
        ) from None
    return onnx


class SpeakerGraph:
    """An ONNX graph of CAM++, and which of its stored tensors is which tensor of the network.

    Attributes:
        config: sizes of the network, read off the graph.
        folded: names of the BatchNorms that are folded into the convolution before them.
        stored_names: {tensor name of the 3D-Speaker module: name in the graph}; the bias of a folded BatchNorm is the
            bias of its convolution.

    Raises:
        MossError: the file is not an ONNX file, or does not have the operators of CAM++ in their order.
    """

    def __init__(self, path: str | Path) -> None:
        self._onnx = import_onnx()
        self.path = Path(path)
        if not self.path.is_file():
            raise MossError(f"{path}: no such file")
        try:
            self.model = self._onnx.load(str(path), load_external_data=False)
            if not self.model.graph.node:
                raise ValueError("it has no graph")
        except Exception as error:  # protobuf raises its own DecodeError
            raise MossError(f"{path}: not a readable ONNX file ({error})") from error
        self._check_tensors()
        self._check_order()
        graph = self.model.graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._alias: dict[str, str] = {}
        for node in graph.node:
            if not node.output or len(node.input) < MIN_INPUTS.get(node.op_type, 0):
                raise MossError(
                    f"{path}: the {short(node.op_type)} node {short(node.name)!r} lacks inputs or an output"
                )
            if node.op_type == "Identity":
                self._alias[node.output[0]] = node.input[0]
            elif node.op_type == "Constant":
                value = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
                if value is not None:
                    self._tensors[node.output[0]] = value
        self._nodes = [n for n in graph.node if n.op_type in ("Conv", "Gemm", "BatchNormalization")]
        self.config = self._config()
        self.folded: set[str] = set()
        self.stored_names: dict[str, str] = {}
        self._walk()

    def tensors(self) -> MemoryTensors:
        """The tensors of the network under their 3D-Speaker names; a folded BatchNorm only adds its bias."""
        tensors = {name: self._array(stored) for name, stored in self.stored_names.items()}
        for bn in self.folded:
            bias = tensors.pop(f"{bn}.bias")
            if _has_affine(bn):
                tensors[f"{bn}.weight"] = np.ones_like(bias)
                tensors[f"{bn}.bias"] = bias
                tensors[f"{bn}.running_mean"] = np.zeros_like(bias)
            else:
                tensors[f"{bn}.running_mean"] = -bias
            tensors[f"{bn}.running_var"] = np.full_like(bias, UNIT_VARIANCE)
        return MemoryTensors(self.path, tensors)

    def write(self, path: str | Path, source: TensorSource) -> None:
        """Writes the graph with the tensors of `source`; tensors with equal values are left bit-identical."""
        values: dict[str, np.ndarray] = {}
        convs = {bn: conv for conv, bn in _pairs(self.config) if bn in self.folded}
        for name, stored in self.stored_names.items():
            if not any(name == f"{bn}.bias" for bn in self.folded):
                stored = self._resolve(stored)
                values[stored] = self._check_shared(stored, values, source.read(name), name)
        for bn, conv in convs.items():
            weight, bias = _fold(source, conv, bn)
            for name, value in ((f"{conv}.weight", weight), (f"{bn}.bias", bias)):
                values[self._resolve(self.stored_names[name])] = value
        for stored, value in values.items():
            if value.tobytes() != self._array(stored).tobytes() or value.dtype != self._array(stored).dtype:
                tensor = self._tensors[stored]
                tensor.CopyFrom(self._onnx.numpy_helper.from_array(value, tensor.name))
        with atomic_file(path) as part:
            part.write_bytes(self.model.SerializeToString())

    def _check_tensors(self) -> None:
        """Raises MossError for tensors stored in another file, or with data that does not fit their shape."""
        for tensor in _stored_tensors(self.model):
            where = f"{self.path}: tensor {tensor.name!r}"
            if tensor.data_location == self._onnx.TensorProto.EXTERNAL or tensor.external_data:
                raise MossError(f"{where} is stored in another file (external data), expected it in this one")
            if any(size < 0 for size in tensor.dims):
                raise MossError(f"{where} has the shape {list(tensor.dims)}, expected no negative sizes")
            if tensor.HasField("segment"):
                raise MossError(f"{where} is a segment of a larger one, expected whole tensors")
            if tensor.data_type in STORED_TYPES:
                size, field = STORED_TYPES[tensor.data_type]
                raw = tensor.HasField("raw_data")
                count = len(tensor.raw_data) / size if raw else len(getattr(tensor, field))
                if count != math.prod(tensor.dims):
                    raise MossError(f"{where} has the shape {list(tensor.dims)} and {count:g} values")

    def _check_order(self) -> None:
        """Raises MossError if a value depends on itself."""
        needs: dict[str, set[str]] = {}
        for node in self.model.graph.node:
            for output in filter(None, node.output):
                needs.setdefault(output, set()).update(filter(None, node.input))
        try:
            graphlib.TopologicalSorter(needs).prepare()
        except graphlib.CycleError as error:
            raise MossError(f"{self.path}: values depend on themselves: {' <- '.join(error.args[1][:6])}") from None

    def _check_shared(self, stored: str, values: Mapping[str, np.ndarray], value: np.ndarray, name: str) -> np.ndarray:
        other = values.get(stored)
        if other is not None and other.tobytes() != value.tobytes():
            raise MossError(
                f"{self.path}: {name!r} shares a stored tensor with another parameter, but their values differ"
            )
        return value

    def _resolve(self, name: str) -> str:
        while name not in self._tensors and name in self._alias:
            name = self._alias[name]
        return name

    def _array(self, name: str) -> np.ndarray:
        tensor = self._tensors.get(self._resolve(name))
        if tensor is None:
            raise MossError(f"{self.path}: {short(name)!r} is computed in the graph, expected stored values")
        try:
            return self._onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # onnx and numpy raise many kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise MossError(f"{self.path}: the values of {short(name)!r} cannot be read ({reason[:200]})") from error

    def _shape(self, name: str) -> tuple[int, ...]:
        tensor = self._tensors.get(self._resolve(name))
        return () if tensor is None else tuple(tensor.dims)

    def _config(self) -> SpeakerConfig:
        """The sizes of the network, read off the kernel shapes.

        Convolutions with 4-D kernels are the head. In the dense blocks a layer is four convolutions, the second with
        a kernel of width 3; a single convolution is the transition after a block.
        """
        convs = [(self._shape(n.input[1]), n) for n in self._nodes if n.op_type != "BatchNormalization"]
        shapes = [shape for shape, _ in convs]
        try:
            count = next(i for i, shape in enumerate(shapes) if len(shape) != 4)
            starts = [i - 2 for i in range(count) if shapes[i][2:] == (1, 1)]
            ends = [*starts[1:], count - 1]
            head = [(end - start - 1) // 2 for start, end in zip(starts, ends, strict=True)]
            first_group, second_group = head
            i = count + 1
            layers = [0]
            dilations = []
            while i + 1 < len(shapes):
                if shapes[i + 1][2:] == (3,):
                    if layers[-1] == 0:
                        dilations.append(_ints(convs[i + 1][1], "dilations", [1])[0])
                    layers[-1] += 1
                    i += 4
                else:
                    layers.append(0)
                    i += 1
            inner = shapes[count + 1][0]
            growth = shapes[count + 2][0]
            pools = [n for n in self.model.graph.node if n.op_type == "AveragePool"]
            segment = _ints(pools[0], "kernel_shape", [SEGMENT_FRAMES])[-1] if pools else SEGMENT_FRAMES
            # SpeakerConfig refuses such numbers as well, but its message would be replaced below.
            long = [n for n in (*dilations, segment) if not 1 <= n <= MAX_FRAMES]
            config = (
                None
                if long
                else SpeakerConfig(
                    num_mel_bins=shapes[count][1] // shapes[0][0] * 2 ** (len(head) + 1),
                    embedding_size=shapes[-1][0],
                    head_channels=shapes[0][0],
                    head_blocks=(first_group, second_group),
                    init_channels=shapes[count][0],
                    growth_rate=growth,
                    bottleneck=inner,
                    context_reduction=inner // shapes[count + 3][0],
                    dense_layers=tuple(layers[:-1]),
                    dense_dilations=tuple(dilations),
                    segment_frames=segment,
                )
            )
        except (StopIteration, IndexError, ValueError, ZeroDivisionError):
            raise MossError(f"{self.path}: its {len(shapes)} convolutions are not those of CAM++") from None
        if config is None:
            raise MossError(f"{self.path}: a dilation or pooling of {long[0]} frames, expected 1 to {MAX_FRAMES}")
        return config

    def _walk(self) -> None:
        nodes = list(self._nodes)
        extra = None
        problems = []
        for operator in operators(self.config.head_blocks, self.config.dense_layers):
            if not operator.is_conv and extra is not None:
                self.folded.add(operator.name)
                self.stored_names[f"{operator.name}.bias"] = extra
                extra = None
                continue
            if extra is not None:
                problems.append(f"{operator.name}: the convolution before it has a bias that CAM++ does not have")
                extra = None
            node = nodes.pop(0) if nodes else None
            if node is None or (node.op_type == "BatchNormalization") == operator.is_conv:
                kind = "convolution" if operator.is_conv else "BatchNormalization"
                problems.append(
                    f"{operator.name}: expected a {kind}, the graph has {node.op_type if node else 'no more'}"
                )
                break
            inputs = list(node.input)
            if operator.is_conv:
                self.stored_names[f"{operator.name}.weight"] = inputs[1]
                bias = inputs[2] if len(inputs) > 2 and inputs[2] else None
                if operator.bias and bias is not None:
                    self.stored_names[f"{operator.name}.bias"] = bias
                elif operator.bias:
                    problems.append(f"{operator.name}: the convolution has no bias")
                else:
                    extra = bias
            else:
                self._batch_norm(operator.name, node, problems)
        problems += [f"one more {node.op_type} after the last layer: {node.name}" for node in nodes]
        missing = {n: p for n, p in self.stored_names.items() if self._resolve(p) not in self._tensors}
        problems += [
            f"{name}: its values are computed in the graph ({stored}), not stored" for name, stored in missing.items()
        ]
        used = {self._resolve(stored) for stored in self.stored_names.values()}
        for name, tensor in self._tensors.items():
            floating = tensor.data_type in (self._onnx.TensorProto.FLOAT, self._onnx.TensorProto.FLOAT16)
            if floating and math.prod(tensor.dims) > 1 and name not in used and not self._is_trivial(name):
                problems.append(f"unmapped: {name} {list(tensor.dims)}")
        for name, stored in self.stored_names.items():
            if stored != name and name in self._tensors and stored in self.stored_names:
                problems.append(f"{name}: the operator at its position has {stored}")
        if problems:
            raise MossError("\n  ".join([f"{self.path}: the graph is not that of CAM++", *problems]))

    def _batch_norm(self, name: str, node: Any, problems: list[str]) -> None:
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), EPSILON)
        if abs(epsilon - EPSILON) > 1e-9:
            problems.append(f"{name}: epsilon {epsilon:g}, expected {EPSILON:g}")
        stored_names = dict(zip(BN_INPUTS, node.input[1:5], strict=True))
        if not _has_affine(name):
            for part, neutral in (("weight", 1), ("bias", 0)):
                if not np.all(self._array(stored_names.pop(part)) == neutral):
                    problems.append(f"{name}: its {part} is not {neutral}")
        self.stored_names |= {f"{name}.{part}": stored for part, stored in stored_names.items()}

    def _is_trivial(self, name: str) -> bool:
        """A constant of zeros or ones, such as the affine part of a BatchNorm that has none."""
        values = self._array(name)
        return bool(np.all(values == 0) or np.all(values == 1))


def _stored_tensors(model: Any) -> Iterator[Any]:
    """Every tensor in the file: initialisers, and attributes of operators, those of inner graphs too."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if not nodes:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes = list(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs += attribute.graphs


def _has_affine(bn: str) -> bool:
    return bn != "xvector.dense.nonlinear.batchnorm"


def _pairs(config: SpeakerConfig) -> Iterator[tuple[str, str]]:
    """(convolution, BatchNorm right behind it)."""
    previous = None
    for operator in operators(config.head_blocks, config.dense_layers):
        if not operator.is_conv and previous is not None and previous.is_conv:
            yield previous.name, operator.name
        previous = operator


def _fold(source: TensorSource, conv: str, bn: str) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of a convolution with the BatchNorm behind it folded in; exact for one that only adds."""
    weight = source.read(f"{conv}.weight")
    mean = source.read(f"{bn}.running_mean")
    variance = source.read(f"{bn}.running_var")
    scale = source.read(f"{bn}.weight") if _has_affine(bn) else np.ones_like(mean)
    bias = source.read(f"{bn}.bias") if _has_affine(bn) else np.zeros_like(mean)
    if np.all(variance == UNIT_VARIANCE.astype(variance.dtype)) and np.all(scale == 1):
        if not _has_affine(bn):
            return weight, -mean
        if np.all(mean == 0):
            return weight, bias
    gain = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + EPSILON)
    folded = weight * gain.reshape(-1, *[1] * (weight.ndim - 1))
    return folded.astype(weight.dtype), (bias - mean * gain).astype(weight.dtype)


def _ints(node: Any, name: str, default: list[int]) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == name), default)

"""The speaker network from and to ONNX, with real exports of a small CAM++ written by torch."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

from onnx.reference import ReferenceEvaluator  # noqa: E402

from moss_jax.convert.onnx_speaker import SpeakerGraph  # noqa: E402
from moss_jax.convert.onnx_write import write_speaker_graph  # noqa: E402
from moss_jax.convert.stream import MemoryTensors  # noqa: E402
from moss_jax.convert.tables import speaker as speaker_table  # noqa: E402
from moss_jax.errors import MossError  # noqa: E402
from moss_jax.nn.tree import unflatten  # noqa: E402
from moss_jax.speech_decoder.speaker import CAMPPlus, speaker_shapes  # noqa: E402
from tests.convert.campplus_torch import SMALL, CampPlus, export, random_campplus, state  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return random_campplus()


@pytest.fixture(scope="module")
def exports(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    for folded in (False, True):
        export(model, folder / f"{folded}.onnx", folded)
    return folder


def ours(graph, features):
    table = speaker_table.table(graph.config)
    flat = table.to_ours(graph.tensors().tensors, speaker_shapes(graph.config), "graph")
    return np.asarray(CAMPPlus(graph.config).apply({"params": unflatten(flat)}, features))


def test_the_exports_have_the_expected_operators(exports):
    """The two variants differ as real files do: folded ones lose BatchNorms and names."""
    kept, folded = (onnx.load(exports / f"{name}.onnx").graph for name in (False, True))
    names = {tensor.name for tensor in folded.initializer}
    assert any(name.startswith("onnx::Conv") for name in names) and "head.conv1.weight" not in names
    count = [sum(n.op_type == "BatchNormalization" for n in graph.node) for graph in (kept, folded)]
    assert count[0] > count[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True])
def test_an_exported_network_is_the_same_network(model, exports, folded):
    graph = SpeakerGraph(exports / f"{folded}.onnx")
    features = np.random.default_rng(0).normal(size=(1, 230, 80)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(ours(graph, features), expected, rtol=2e-4, atol=2e-4)
    config = graph.config
    assert (config.dense_layers, config.dense_dilations, config.head_blocks) == ((2, 3, 2), (1, 2, 2), (2, 2))
    assert (config.bottleneck, config.context_reduction, config.segment_frames) == (8, 2, 100)


def test_initializers_that_the_exporter_shares(tmp_path):
    """Equal tensors, such as the statistics of untrained BatchNorms, may be stored once and referred to."""
    torch.manual_seed(0)
    model = CampPlus(**SMALL).eval()
    export(model, tmp_path / "shared.onnx", folded=False)
    graph = SpeakerGraph(tmp_path / "shared.onnx")
    expected = state(model)
    assert len(graph.model.graph.initializer) < len(expected)
    result = graph.tensors().tensors
    assert all(result[name].tobytes() == expected[name].tobytes() for name in expected)
    graph.write(tmp_path / "again.onnx", MemoryTensors("x", expected))
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "shared.onnx").read_bytes()
    with pytest.raises(MossError, match="shares a stored tensor with another parameter"):
        graph.write(tmp_path / "other.onnx", MemoryTensors("x", state(random_campplus())))


def test_kept_names_are_bit_identical(model, exports):
    graph = SpeakerGraph(exports / "False.onnx")
    result = graph.tensors().tensors
    expected = state(model)
    assert sorted(result) == sorted(expected) and graph.folded == set()
    assert all(result[name].tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.parametrize("folded", [False, True])
def test_round_trip_through_our_layout(exports, tmp_path, folded):
    source = exports / f"{folded}.onnx"
    graph = SpeakerGraph(source)
    table = speaker_table.table(graph.config)
    flat = table.to_ours(graph.tensors().tensors, speaker_shapes(graph.config), "graph")
    SpeakerGraph(source).write(tmp_path / "again.onnx", MemoryTensors("x", dict(table.to_theirs(flat))))
    assert (tmp_path / "again.onnx").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("folded", [False, True])
def test_changed_weights_are_written_into_the_graph(exports, tmp_path, folded):
    """Weights with other BatchNorm statistics: folded again on the way out."""
    other = random_campplus(seed=1)
    SpeakerGraph(exports / f"{folded}.onnx").write(tmp_path / "other.onnx", MemoryTensors("x", state(other)))
    features = np.random.default_rng(0).normal(size=(1, 230, 80)).astype(np.float32)
    with torch.no_grad():
        expected = other(torch.from_numpy(features)).numpy()
    session = ReferenceEvaluator(onnx.load(tmp_path / "other.onnx"))
    np.testing.assert_allclose(session.run(None, {"input": features})[0], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("frames", [199, 260, 400])
def test_a_graph_of_our_own_computes_the_same(model, tmp_path, frames):
    write_speaker_graph(tmp_path / "new.onnx", MemoryTensors("x", state(model)), SpeakerGraph_config(model, tmp_path))
    session = ReferenceEvaluator(onnx.load(tmp_path / "new.onnx"))
    features = np.random.default_rng(0).normal(size=(1, frames, 80)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(session.run(None, {"input": features})[0], expected, rtol=2e-4, atol=2e-4)
    result = SpeakerGraph(tmp_path / "new.onnx").tensors().tensors
    assert sorted(result) == sorted(state(model))


def SpeakerGraph_config(model, folder):
    export(model, folder / "config.onnx", False)
    return SpeakerGraph(folder / "config.onnx").config


def _remove_relu_conv(graph):
    node = next(n for n in graph.node if n.op_type == "Conv" and "linear_local" in n.input[1])
    graph.node.remove(node)


def _epsilon(graph):
    node = next(n for n in graph.node if n.op_type == "BatchNormalization")
    next(a for a in node.attribute if a.name == "epsilon").f = 1e-3


def _swap(graph):
    nodes = [n for n in graph.node if n.op_type == "BatchNormalization"]
    a, b = (next(n for n in nodes if n.input[1] == f"head.{name}.weight") for name in ("bn1", "bn2"))
    a.input[1], b.input[1] = b.input[1], a.input[1]


def _extra(graph):
    graph.initializer.append(onnx.numpy_helper.from_array(np.arange(5, dtype=np.float32), "surprise"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_relu_conv, "are not those of CAM|is not that of CAM"),
        (_epsilon, "epsilon 0.001, expected 1e-05"),
        (_swap, "the operator at its position has"),
        (_extra, "unmapped: surprise"),
    ],
)
def test_another_graph_is_refused(exports, tmp_path, damage, message):
    model = onnx.load(exports / "False.onnx")
    damage(model.graph)
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(MossError, match=message):
        SpeakerGraph(tmp_path / "bad.onnx")


def test_not_an_onnx_file(tmp_path):
    (tmp_path / "x.onnx").write_text("hello")
    with pytest.raises(MossError, match="not a readable ONNX file"):
        SpeakerGraph(tmp_path / "x.onnx")
    with pytest.raises(MossError, match="no such file"):
        SpeakerGraph(tmp_path / "y.onnx")


def test_full_size_order():
    """The walk's list of layers has exactly the released network's convolutions and norms."""
    from moss_jax.convert.onnx_speaker import operators
    from moss_jax.speech_decoder.speaker import CAMPPLUS

    names = speaker_table.table(CAMPPLUS).shapes(speaker_shapes(CAMPPLUS))
    walked = {operator.name for operator in operators(CAMPPLUS.head_blocks, CAMPPLUS.dense_layers)}
    assert walked == {name.rpartition(".")[0] for name in names}
    assert SMALL["growth_rate"] == 4


def changed(exports, path, change):
    """A copy of an export after `change(model)`."""
    graph = onnx.load(exports / "False.onnx")
    change(graph)
    path.write_bytes(graph.SerializeToString())
    return path


def weights(model):
    return next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)


def identities(*pairs):
    """Identity operators; the first convolution reads the output of the last one."""

    def change(model):
        name = next(node for node in model.graph.node if node.op_type == "Conv").input[1]
        for node in model.graph.node:
            node.input[:] = [pairs[-1][1] if one == name else one for one in node.input]
        for source, target in pairs:
            model.graph.node.append(onnx.helper.make_node("Identity", [source.format(name)], [target]))

    return change


def through(operator):
    """Two other operators that feed each other, which nothing reads."""

    def change(model):
        for source, target in (("p", "q"), ("q", "p")):
            model.graph.node.append(onnx.helper.make_node(operator, [source, source], [target]))

    return change


@pytest.mark.parametrize(
    "change",
    [
        identities(("b", "a"), ("a", "b")),
        identities(("a", "a")),
        identities(("c", "a"), ("a", "b"), ("b", "c")),
        identities(("{0}", "a"), ("b", "a"), ("a", "b")),
        through("Add"),
    ],
    ids=["two", "itself", "three", "two writers", "another operator"],
)
def test_a_cyclic_graph_is_refused(exports, tmp_path, change):
    path = changed(exports, tmp_path / "cycle.onnx", change)
    with pytest.raises(MossError, match=r"cycle\.onnx: values depend on themselves"):
        SpeakerGraph(path)


def test_a_chain_of_identities_is_followed(exports, tmp_path):
    path = changed(exports, tmp_path / "chain.onnx", identities(("{0}", "a"), ("a", "b"), ("b", "c")))
    expected, result = (SpeakerGraph(p).tensors().tensors for p in (exports / "False.onnx", path))
    assert all(np.array_equal(result[name], value) for name, value in expected.items())


def external(tensor):
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "0")):
        tensor.external_data.add(key=key, value=value)


def external_in_a_branch(model):
    """In the inner graph of an operator, where an export would write it again."""
    tensor = onnx.numpy_helper.from_array(np.ones(3, np.float32), "inner")
    external(tensor)
    graph = onnx.helper.make_graph([], "branch", [], [], [tensor])
    model.graph.node.append(onnx.helper.make_node("If", ["condition"], ["unused"], then_branch=graph))


def external_constant(model):
    tensor = onnx.numpy_helper.from_array(np.ones(3, np.float32), "constant")
    external(tensor)
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["unused"], value=tensor))


@pytest.mark.parametrize(
    "change",
    [lambda model: external(weights(model)), external_constant, external_in_a_branch],
    ids=["weight", "constant", "inner graph"],
)
def test_data_in_another_file_is_refused(exports, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(1 << 16))
    path = changed(exports, tmp_path / "elsewhere.onnx", change)
    with pytest.raises(MossError, match=r"is stored in another file \(external data\)"):
        SpeakerGraph(path)


@pytest.mark.parametrize("dims", [[2**62, 1, 3, 3], [-1, 1, 3, 3], [2**40, 2**40], [0, 1, 3, 3], [], [7] * 30])
def test_a_shape_that_does_not_fit_its_values_is_refused(exports, tmp_path, dims):
    def change(model):
        weights(model).dims[:] = dims

    with pytest.raises(MossError, match="has the shape"):
        SpeakerGraph(changed(exports, tmp_path / "shape.onnx", change))


def test_values_in_the_wrong_field_are_refused(exports, tmp_path):
    def change(model):
        tensor = weights(model)
        tensor.ClearField("raw_data")
        tensor.int32_data.extend([0] * int(np.prod(tensor.dims)))

    with pytest.raises(MossError, match="and 0 values"):
        SpeakerGraph(changed(exports, tmp_path / "field.onnx", change))


@pytest.mark.parametrize(("name", "size"), [("dilations", 2**62), ("dilations", -1), ("kernel_shape", 0)])
def test_an_impossible_number_of_frames_is_refused(exports, tmp_path, name, size):
    def change(model):
        operator = "AveragePool" if name == "kernel_shape" else "Conv"
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == operator and attribute.name == name:
                    attribute.ints[:] = [size] * len(attribute.ints)

    with pytest.raises(MossError, match=f"a dilation or pooling of {size} frames"):
        SpeakerGraph(changed(exports, tmp_path / "frames.onnx", change))

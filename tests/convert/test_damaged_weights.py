"""Damaged .pt and .onnx files are readable errors and do not allocate the sizes that they claim."""

import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from moss_jax.convert.onnx_speaker import SpeakerGraph  # noqa: E402
from moss_jax.convert.torch_file import read_torch  # noqa: E402
from moss_jax.errors import MossError  # noqa: E402
from tests.convert.campplus_torch import export, random_campplus  # noqa: E402


def quantised():
    return torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)


TENSORS = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "layout torch.sparse_csr|not a readable PyTorch file"),
    "float8": (lambda: torch.zeros(3).to(torch.float8_e4m3fn), "of torch.float8_e4m3fn, expected one of float32"),
    "other float8": (lambda: torch.zeros(3).to(torch.float8_e5m2), "of torch.float8_e5m2"),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), "of torch.complex64"),
    "quantised": (quantised, "of torch.qint8|not a readable PyTorch file"),
    "a tebi-element stride of 0": (lambda: torch.zeros(1).expand(2**40), "with fewer values stored"),
    "rows of stride 0": (lambda: torch.zeros(1, 4).expand(2**38, 4), "with fewer values stored"),
    "meta": (lambda: torch.zeros(3, device="meta"), "on the device meta|not a readable PyTorch file"),
    "string": (lambda: "x", "is a str"),
    "list": (lambda: [torch.zeros(1)], "is a list"),
    "not a number": (lambda: float("nan"), "is a float"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_without_plain_values_is_refused(tmp_path, kind):
    make, message = TENSORS[kind]
    path = tmp_path / "flow.pt"
    torch.save({"plain": torch.ones(2), "odd": make()}, path)
    with pytest.raises(MossError, match=message) as caught:
        read_torch(path)
    assert "flow.pt" in str(caught.value).splitlines()[0]


def test_names_are_strings(tmp_path):
    torch.save({1: torch.ones(2), "1": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(MossError, match="the name 1 is not a string"):
        read_torch(tmp_path / "x.pt")


def test_plain_tensors_are_read(tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    state = {str(kind): torch.ones(2, 3, dtype=kind).T for kind in kinds}
    torch.save(state | {"epoch": 3}, tmp_path / "x.pt")
    found, extras = read_torch(tmp_path / "x.pt")
    assert extras == {"epoch": 3} and set(found.tensors) == set(state)
    assert all(tensor.shape == (3, 2) and np.all(tensor == 1) for tensor in found.tensors.values())


@pytest.mark.parametrize("content", [b"", b"PK", pickle.dumps({"a": 1}), b"\x80\x02" + b"(" * 5000, b"x" * 100])
def test_a_file_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(MossError, match=r"x\.pt: not a readable PyTorch file"):
        read_torch(tmp_path / "x.pt")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "campplus.onnx"
    export(random_campplus(), path, folded=True)
    return onnx.load(path)


def first(model, kind):
    return next(node for node in model.graph.node if node.op_type == kind)


def conv_without_weight(model):
    del first(model, "Conv").input[1:]


def batch_norm_without_variance(model):
    del first(model, "BatchNormalization").input[4:]


def constant_without_value(model):
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["nothing"]))


def constant_of_another_kind(model):
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["number"], value_float=1.0))


def identity_without_input(model):
    model.graph.node.insert(0, onnx.helper.make_node("Identity", [], ["copy"]))


def node_without_output(model):
    del first(model, "Conv").output[:]


def weight_that_is_computed(model):
    first(model, "Conv").input[1] = "computed elsewhere"


def weight_that_is_cut(model):
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
    tensor.raw_data = tensor.raw_data[:8]


def weight_of_huge_claim(model):
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
    tensor.dims[0] = 2**40


DAMAGE = {
    conv_without_weight: "the Conv node .* lacks inputs",
    batch_norm_without_variance: "the BatchNormalization node .* lacks inputs",
    identity_without_input: "the Identity node .* lacks inputs",
    node_without_output: "lacks inputs or an output",
    weight_that_is_computed: "not those of CAM|computed in the graph",
    weight_that_is_cut: r"has the shape \[.*\] and 2 values",
    weight_of_huge_claim: r"has the shape \[1099511627776, .*\] and 36 values",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_graph_is_refused(network, tmp_path, damage):
    model = onnx.ModelProto()
    model.CopyFrom(network)
    damage(model)
    path = tmp_path / "campplus.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(MossError, match=DAMAGE[damage]) as caught:
        SpeakerGraph(path).tensors()
    assert "campplus.onnx" in str(caught.value).splitlines()[0]


@pytest.mark.parametrize("change", [constant_without_value, constant_of_another_kind])
def test_a_constant_without_a_tensor_is_ignored(network, tmp_path, change):
    model = onnx.ModelProto()
    model.CopyFrom(network)
    change(model)
    path = tmp_path / "campplus.onnx"
    path.write_bytes(model.SerializeToString())
    assert SpeakerGraph(path).tensors().tensors

"""Import and export of the released codec."""

import json
import pickle
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from moss_jax.checkpoint import load_tree  # noqa: E402
from moss_jax.convert.codec import export_codec, import_codec, read_codec_configs  # noqa: E402
from moss_jax.convert.tables import flow as flow_table  # noqa: E402
from moss_jax.convert.tables import speech_tokenizer as tokenizer_table  # noqa: E402
from moss_jax.convert.tables import vocoder as vocoder_table  # noqa: E402
from moss_jax.errors import MossError  # noqa: E402
from moss_jax.speech_decoder.config import RELEASED, TINY  # noqa: E402
from moss_jax.speech_decoder.flow.model import flow_shapes  # noqa: E402
from moss_jax.speech_decoder.speaker import speaker_shapes  # noqa: E402
from moss_jax.speech_decoder.vocoder import vocoder_shapes  # noqa: E402
from moss_jax.speech_tokenizer.config import MOSS_SPEECH_CODEC  # noqa: E402
from moss_jax.speech_tokenizer.config import TINY as TOKENIZER  # noqa: E402
from moss_jax.speech_tokenizer.encoder import encoder_shapes  # noqa: E402
from tests.convert.checkpoints import read_tensors, same_tensors, write_codec  # noqa: E402

OLD = vocoder_table.Spelling("generator.", "weight_g", "weight_v")


def quiet(line):
    pass


def load(path):
    state = torch.load(path, weights_only=True)
    tensors = {name: value.numpy() for name, value in state.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec") / "released"
    return folder, write_codec(folder)


def test_round_trip(released, tmp_path):
    folder, files = released
    messages = []
    codec = import_codec(folder, tmp_path / "system", messages.append)
    assert not any("unknown keys" in line for line in messages)
    assert codec == read_codec_configs(tmp_path / "system")
    assert codec.tokenizer == TOKENIZER
    expected = replace(TINY.flow, codebook_size=96, **{k: getattr(RELEASED.flow, k) for k in ("chunk", "noise_frames")})
    assert codec.decoder.flow == expected and codec.decoder.vocoder == TINY.vocoder
    assert codec.decoder.chunks == (5, 25)
    for part, shapes in {
        "speech_tokenizer": encoder_shapes(TOKENIZER),
        "speech_decoder/flow.safetensors": flow_shapes(TINY.flow),
        "speech_decoder/flow_chunk_5.safetensors": flow_shapes(TINY.flow),
        "speech_decoder/vocoder.safetensors": vocoder_shapes(TINY.vocoder),
        "speech_decoder/speaker.safetensors": speaker_shapes(codec.decoder.speaker),
    }.items():
        load_tree(tmp_path / "system" / part, shapes)
    (tmp_path / "again").mkdir()
    export_codec(tmp_path / "system", tmp_path / "again", quiet)
    same_tensors(read_tensors(tmp_path / "again"), files["model.safetensors"])
    for name in ("flow.pt", "flow-chunk-5.pt", "flow-chunk-25.pt", "hift.pt"):
        tensors, extras = load(tmp_path / "again" / "flow" / name)
        same_tensors(tensors, files[name])
        assert extras == load(folder / "flow" / name)[1]
    for name in ("config.json", "preprocessor_config.json", "flow/config.yaml", "flow/campplus.onnx", "flow/other.pt"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_round_trip_of_the_older_spelling(tmp_path):
    files = write_codec(tmp_path / "released", OLD)
    assert "generator.conv_pre.weight_g" in files["hift.pt"]
    import_codec(tmp_path / "released", tmp_path / "system", quiet)
    (tmp_path / "again").mkdir()
    export_codec(tmp_path / "system", tmp_path / "again", quiet)
    same_tensors(load(tmp_path / "again/flow/hift.pt")[0], files["hift.pt"])


@pytest.mark.parametrize("old", [False, True])
def test_the_spellings_are_those_of_torch(old):
    from torch import nn

    transposed = nn.ConvTranspose1d(4, 3, 5)
    norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    names = {f"ups.0.{name}": tuple(value.shape) for name, value in norm(transposed).state_dict().items()}
    spelling = vocoder_table.spelling(names)
    table = vocoder_table.table(TINY.vocoder, spelling)
    shapes = table.shapes(
        {
            "ups_0/g": np.zeros(4, np.float32),
            "ups_0/v": np.zeros((5, 4, 3), np.float32),
            "ups_0/bias": np.zeros(3, np.float32),
        }
    )
    assert shapes == names


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a checkpoint ran its code')",))


def _pickled(folder):
    (folder / "flow" / "flow.pt").write_bytes(pickle.dumps(Evil()))


def _state(file, change):
    def damage(folder):
        state = torch.load(folder / "flow" / file, weights_only=True)
        change(state)
        torch.save(state, folder / "flow" / file)

    return damage


def _cut(folder):
    path = folder / "flow" / "hift.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "missing file": (lambda f: (f / "flow/hift.pt").unlink(), "not a complete released codec, missing: flow/hift.pt"),
    "code in a .pt": (_pickled, "flow.pt: not a readable PyTorch file of plain tensors"),
    "cut in half": (_cut, "hift.pt: not a readable PyTorch file"),
    "unmapped": (_state("flow.pt", lambda s: s.update(surprise=torch.zeros(2))), "unmapped: surprise"),
    "missing": (_state("flow-chunk-5.pt", lambda s: s.pop("encoder_proj.bias")), "missing: encoder_proj.bias"),
    "misshapen": (
        _state("hift.pt", lambda s: s.update({"conv_pre.bias": torch.zeros(20)})),
        "misshapen: conv_pre.bias",
    ),
    "contradicting": (
        _state("hift.pt", lambda s: s.update({"conv_post.bias": torch.zeros(20)})),
        "contradict each other: vocoder",
    ),
    "not a tensor": (_state("flow.pt", lambda s: s.update(args={"a": 1})), "unmapped: args is a dict"),
    "unknown counter": (_state("flow.pt", lambda s: s.update(lr=0.1)), "unmapped: lr = 0.1"),
    "a list": (lambda f: torch.save([1], f / "flow/flow.pt"), "holds a list, expected a dictionary"),
    "config": (lambda f: (f / "config.json").write_text("{}"), "config.json: missing: d_model"),
    "encoder cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-7]),
        "cut short",
    ),
}


@pytest.fixture(scope="module")
def template(released):
    return released[0]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_release_is_refused(template, tmp_path, kind):
    folder = tmp_path / "released"
    shutil.copytree(template, folder)
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(MossError, match=message) as caught:
        import_codec(folder, tmp_path / "system", quiet)
    assert "released" in str(caught.value).splitlines()[0]


def test_full_size_names_and_shapes():
    """The tables of the codec specification: 1121 flow tensors, 328 of the vocoder; parameters as counted there."""
    flow = flow_table.table(RELEASED.flow).shapes(flow_shapes(RELEASED.flow))
    assert len(flow) == 1121
    assert 120.6e6 < sum(np.prod(shape) for shape in flow.values()) < 120.8e6
    vocoder = vocoder_table.table(RELEASED.vocoder).shapes(vocoder_shapes(RELEASED.vocoder))
    assert len(vocoder) == 328
    assert 20.7e6 < sum(np.prod(shape) for shape in vocoder.values()) < 20.9e6
    encoder = tokenizer_table.table(MOSS_SPEECH_CODEC).shapes(encoder_shapes(MOSS_SPEECH_CODEC))
    assert len(encoder) == 4 + 1 + 16 * 15 + 2
    assert encoder["encoder.codebook.weight"] == (16384, 1280)
    assert encoder["encoder.layers.15.self_attn.k_proj.weight"] == (1280, 1280)
    assert encoder["encoder.embed_positions2.weight"] == (375, 1280)
    assert vocoder["ups.1.parametrizations.weight.original0"] == (256, 1, 1)
    assert flow["decoder.estimator.up_blocks.0.0.res_conv.weight"] == (256, 512, 1)


def test_unknown_config_keys_are_reported(template, tmp_path):
    path = tmp_path / "released" / "config.json"
    messages = []
    shutil.copytree(template, path.parent)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantize_groups": 2}))
    import_codec(path.parent, tmp_path / "system", messages.append)
    assert "quantize_groups" in messages[-1]


def test_a_config_that_was_changed_by_hand_is_refused(released, tmp_path):
    import_codec(released[0], tmp_path / "system", quiet)
    path = tmp_path / "system" / "speech_decoder" / "config.json"
    data = json.loads(path.read_text())
    data["vocoder"]["mel_bins"] = 9
    path.write_text(json.dumps(data))
    with pytest.raises(MossError, match=r"speech_decoder/config.json: .*mel_bins"):
        read_codec_configs(tmp_path / "system")


@pytest.mark.parametrize(("module", "file"), [("torch", "flow.pt"), ("onnx", "campplus.onnx")])
def test_a_missing_package_is_named(released, monkeypatch, module, file):
    from moss_jax.convert.onnx_speaker import SpeakerGraph
    from moss_jax.convert.torch_file import read_torch

    monkeypatch.setitem(sys.modules, module, None)
    read = {"torch": read_torch, "onnx": SpeakerGraph}[module]
    with pytest.raises(MossError, match=r"not installed, .* pip install 'moss-jax\[convert\]'"):
        read(released[0] / "flow" / file)

"""Changed questions, system.json and config.json are read or refused, without a crash."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.checkpoint.config_io import read_config, write_config
from moss_jax.checkpoint.system_folder import SystemFolder
from moss_jax.dialogue.questions import read_questions
from moss_jax.errors import MossError
from moss_jax.speech_decoder import config as speech_decoder
from moss_jax.speech_decoder.codes import read_codes
from moss_jax.speech_decoder.flow.model import flow_shapes
from moss_jax.speech_decoder.speaker import speaker_shapes
from moss_jax.speech_decoder.vocoder import vocoder_shapes
from moss_jax.speech_lm import SpeechLMConfig, model_shapes
from moss_jax.speech_lm import config as transformer
from moss_jax.speech_tokenizer import config as speech_tokenizer
from moss_jax.speech_tokenizer.encoder import encoder_shapes
from tests.checkpoint.test_changed_headers import changed

LINES = [
    {"id": "a", "text": "Hello"},
    {"id": 3, "codes": [1, 2, 3]},
    {"turns": [{"role": "system", "text": "Be kind."}, {"role": "user", "codes": [5]}]},
    {"audio": "none.wav"},
]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_a_changed_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_text(json.dumps(changed(data, data.draw(st.sampled_from(LINES)))) + "\n")
    for read in (read_questions, read_codes):
        try:
            read(path)
        except MossError as error:
            assert "lines.jsonl" in str(error).splitlines()[0]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(data=st.data())
def test_a_changed_system_json(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "changed-system"
    folder.mkdir(exist_ok=True)
    settings = {"format": "moss-jax-1", "default_voice": "anna", "sampling": {"temperature": 0.5}}
    (folder / "system.json").write_text(json.dumps(changed(data, settings)))
    try:
        found = SystemFolder(folder).settings
        assert isinstance(found.get("default_voice"), str | None)
    except MossError as error:
        assert "system.json" in str(error).splitlines()[0]


CONFIGS = {
    "transformer": (SpeechLMConfig, transformer.TINY, model_shapes),
    "speech_tokenizer": (type(speech_tokenizer.TINY), speech_tokenizer.TINY, encoder_shapes),
    "flow": (type(speech_decoder.TINY.flow), speech_decoder.TINY.flow, flow_shapes),
    "speaker": (type(speech_decoder.TINY.speaker), speech_decoder.TINY.speaker, speaker_shapes),
    "vocoder": (type(speech_decoder.TINY.vocoder), speech_decoder.TINY.vocoder, vocoder_shapes),
}


@pytest.mark.parametrize("part", CONFIGS)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(data=st.data())
def test_a_changed_config(part, data):
    """A config that is accepted describes a model: its parameters have shapes."""
    cls, config, shapes = CONFIGS[part]
    try:
        found = read_config(cls, changed(data, write_config(config)), "config.json")
    except MossError as error:
        assert str(error).startswith("config.json: ")
        return
    assert shapes(found)


def test_a_block_without_dilations_is_refused():
    values = write_config(speech_decoder.TINY.vocoder) | {"resblock_dilations": [[1, 3], []]}
    with pytest.raises(MossError, match="each of the dilations need"):
        read_config(type(speech_decoder.TINY.vocoder), values, "config.json")

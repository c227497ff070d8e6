"""System folders with one damaged file: `moss-jax info`, the settings, configs, voices and text tokenizer.

The language model is loaded only if its own files or the text tokenizer are damaged, as loading it traces the model.
"""

import atexit
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from moss_jax.convert.describe import describe
from moss_jax.convert.random_system import init_random
from moss_jax.dialogue.system import System
from moss_jax.dialogue.voice import save_voice
from moss_jax.speech_decoder.voice import Voice
from tests.fuzz.documents import CHANGES, changed, json_text
from tests.fuzz.edits import edited, edits

SYSTEM = "system.json"
TRANSFORMER = "transformer/config.json"
SPEECH_TOKENIZER = "speech_tokenizer/config.json"
SPEECH_DECODER = "speech_decoder/config.json"
TEXT_TOKENIZER = "text_tokenizer/tokenizer.json"
VOICE = "voices/anna.safetensors"
JSON_FILES = (SYSTEM, TRANSFORMER, SPEECH_TOKENIZER, SPEECH_DECODER, TEXT_TOKENIZER)
FILES = (*JSON_FILES, VOICE, "transformer/model.safetensors", "speech_tokenizer/model.safetensors")

USES = st.sampled_from(["info", "load"])
CASES = st.one_of(
    st.fixed_dictionaries({"use": USES, "file": st.sampled_from(JSON_FILES), "changes": CHANGES}),
    st.fixed_dictionaries({"use": USES, "file": st.sampled_from(FILES), "edits": edits()}),
)


def run(case: dict, folder: Path) -> None:
    copy = folder / "system"
    shutil.copytree(_system(), copy, copy_function=os.link)
    damaged = copy / case["file"]
    content = damaged.read_bytes()
    damaged.unlink()
    if "changes" in case:
        content = json_text(changed(json.loads(content), case["changes"])).encode()
    else:
        content = edited(content, case["edits"])
    damaged.write_bytes(content)

    if case["use"] == "info":
        "\n".join(describe(copy)).encode()
        return
    system = System(copy)
    assert isinstance(system.sampling, dict)
    if case["file"] in (SYSTEM, SPEECH_DECODER, VOICE):
        _ = system.speech_decoder
        system.voice()
        system.voice("anna")
    if case["file"].startswith("speech_tokenizer"):
        _ = system.speech_tokenizer
    if case["file"].startswith(("transformer", "text_tokenizer")):
        text_tokenizer = system.language_model.text_tokenizer
        ids = text_tokenizer.encode("How are you? <|im_end|>")
        text_tokenizer.decode(ids)


@cache
def _system() -> Path:
    """A tiny system with a default voice; it is removed when the process ends."""
    parent = Path(tempfile.mkdtemp(prefix="moss-jax-fuzz-"))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    folder = parent / "tiny"
    init_random(folder, say=lambda line: None)
    flow = System(folder).speech_decoder.config.flow
    rng = np.random.default_rng(0)
    voice = Voice(
        codes=np.arange(4, dtype=np.int32),
        mel=rng.normal(size=(4 * flow.frames_per_code, flow.mel_bins)).astype(np.float32),
        embedding=rng.normal(size=flow.speaker_size).astype(np.float32),
    )
    save_voice(folder / VOICE, voice)
    settings = {"format": "moss-jax-1", "default_voice": "anna", "sampling": {"temperature": 0.7, "top_k": 5}}
    (folder / SYSTEM).write_text(json.dumps(settings), encoding="utf-8")
    return folder

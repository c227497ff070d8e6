"""A conversion has one stacked parameter and part of a shard in memory, never the whole model."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from moss_jax.speech_lm.config import TINY
from tests.convert.checkpoints import write_language_model

# Wide and deep enough that the interpreter's own few hundred MB do not hide the model: 0.4 GB in bfloat16.
CONFIG = replace(
    TINY,
    hidden_size=512,
    intermediate_size=2048,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    num_shared_layers=40,
    num_modality_layers=4,
    text_vocab_size=2048,
)
CODE = """
import re, sys
from pathlib import Path
from moss_jax.convert.language_model import import_language_model, language_config
from moss_jax.speech_lm import model_shapes
def memory(field):
    return 1024 * int(re.search(field + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
model_shapes(language_config(Path(sys.argv[1])))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
before = memory("VmRSS")
import_language_model(sys.argv[1], Path(sys.argv[2]), print)
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read as Linux tells it")
def test_peak_memory_of_an_import(tmp_path):
    tensors = write_language_model(tmp_path / "released", CONFIG, shards=4)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    shard = max(path.stat().st_size for path in (tmp_path / "released").glob("*.safetensors"))
    stacked = CONFIG.num_shared_layers * sizes["model.shared_block.layers.0.mlp.up_proj.weight"]
    total = sum(sizes.values())
    del tensors
    arguments = [str(tmp_path / "released"), str(tmp_path / "system")]
    run = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout.split()[-1])
    assert stacked / 2 < peak < 1.5 * shard + stacked  # below half a parameter it would not have been measured
    assert 1.5 * shard + stacked < 0.7 * total  # otherwise the test could not tell

# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train nano in Colab
#
# The recipe that trained nano, with a tenth of the corpus and of the steps: from synthetic speech to a system that
# answers in speech. All losses decrease, but good answers need the complete recipe, `moss-jax train-nano`, which takes
# an hour and a half on two CPU cores.
#
# Each step is done once; if you run an interrupted cell again, it resumes.

# %% [markdown]
# ## Install
#
# Run this notebook in a clone of the project. In Colab, clone or upload the project and set PROJECT to its folder. The
# corpus is synthesized with espeak-ng, which is part of the extra `espeak`.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

PROJECT = next(
    (p for p in (Path.cwd(), Path.cwd().parent, Path("/content/moss_jax")) if (p / "setup.py").is_file()), None
)
if any(importlib.util.find_spec(name) is None for name in ("moss_jax", "espeakng_loader")):
    assert PROJECT, "the project was not found: clone it, then set PROJECT to its folder"
    # -e: an editable installation, so that changes to the project take effect
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", f"{PROJECT}[train,espeak]"], check=True)

# %%
import json

import matplotlib.pyplot as plt
import soundfile
from IPython.display import Audio, display

import moss_jax
from moss_jax.recipes.nano.train import Recipe

QUICK = bool(os.environ.get("MOSS_JAX_QUICK"))  # a few steps of each training, to test the notebook
recipe = Recipe(quick=QUICK, share=1.0 if QUICK else 0.1)
CORPUS = Path("nano/corpus")
RUNS = Path("nano/runs")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves(name, *columns):
    """Plots columns of the metrics of a training run."""
    rows = lines(RUNS / name / "metrics.jsonl")
    _, axes = plt.subplots(1, len(columns), figsize=(4.5 * len(columns), 3), squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.plot([row["step"] for row in rows], [row[column] for row in rows])
        axis.set(title=f"{name}: {column}", xlabel="step")
    plt.show()


# %% [markdown]
# ## Synthetic speech
#
# A closed domain: sums, capitals, colours, digits. Questions are spoken by twelve voices, answers by one.

# %%
recipe.run(to_step="corpus")
for name in ("tokenizer", "decoder"):
    clip = lines(CORPUS / f"{name}.jsonl")[0]
    print(clip["text"])
    display(Audio(str(CORPUS / clip["audio"])))

# %% [markdown]
# ## Speech tokenizer
#
# A causal encoder is trained to recognise words from 256 codes at 12.5 codes per second. *Perplexity* is the effective
# number of codes in use.

# %%
recipe.run(to_step="speech_tokenizer")
curves("speech_tokenizer", "asr_loss", "mel_loss", "perplexity")

# %% [markdown]
# ## Speech decoder
#
# A flow model is trained to generate mel spectrograms from codes, and a vocoder to generate audio from them.

# %%
recipe.run(to_step="vocoder")
curves("flow", "loss", "grad_norm")
curves("vocoder", "loss", "mel_loss")

# %% [markdown]
# ## Language model
#
# A small Qwen3 is trained on the domain as text. Its last layers become two branches, one for text and one for speech.
# Stage 1 trains the parameters that were added for speech, stage 2 trains all parameters, and SFT trains on
# conversations.

# %%
recipe.run(to_step="sft")
for name in ("text", "stage1", "stage2", "sft"):
    curves(name, "loss", "grad_norm")

# %% [markdown]
# ## Ask the model
#
# After a tenth of the training the answer may be wrong. The bundled nano, which was trained with the complete recipe,
# is asked the same question.

# %%
recipe.run(to_step="system")
question = moss_jax.Turn("user", text="What is two plus three?")
codes = 25 if QUICK else 100
for name, system in (("this model", moss_jax.load("nano/system")), ("complete recipe", moss_jax.load())):
    written = system.reply([question], reply="text", max_new_tokens=codes)
    spoken = system.reply([question], max_new_tokens=codes)
    print(f"{name}: {written.text!r}")
    if spoken.wave.size:
        display(Audio(spoken.wave, rate=spoken.sample_rate))

# %% [markdown]
# A recording, encoded by the speech tokenizer and decoded again.

# %%
system = moss_jax.load("nano/system")
wave, rate = soundfile.read(CORPUS / lines(CORPUS / "decoder.jsonl")[0]["audio"], dtype="float32")
(codes,) = system.encode([(wave, rate)])
voice, _ = system.voice()
resynthesis = system.speech_decoder.decode(codes[:25] if QUICK else codes, voice)
display(Audio(wave, rate=rate), Audio(resynthesis, rate=system.speech_decoder.config.sample_rate))

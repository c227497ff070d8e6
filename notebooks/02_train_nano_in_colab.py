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
# The recipe that made nano, in short: a tenth of the corpus and of the steps. Everything is there, from speech that the
# project makes itself to a system that answers aloud, and every curve goes down; to answer well it takes the whole
# recipe, `moss-jax train-nano`, an hour and a half on two CPU cores.
#
# Each step is done once: run a cell again and it goes on where it was.

# %% [markdown]
# ## Install
#
# In a clone of the project (in Colab: clone it, or upload it as a folder, then say where it is). The corpus is spoken
# by espeak-ng, which the extra `espeak` brings.

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
    assert PROJECT, "the project is not here: clone it, then set PROJECT to its folder"
    # -e: the recipe's configs stand beside the package
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", f"{PROJECT}[train,espeak]"], check=True)

# %%
import json

import matplotlib.pyplot as plt
import soundfile
from IPython.display import Audio, display

import moss_jax
from moss_jax.recipes.nano.train import Recipe

QUICK = bool(os.environ.get("MOSS_JAX_QUICK"))  # a few steps of everything, to see that the notebook goes
recipe = Recipe(quick=QUICK, share=1.0 if QUICK else 0.1)
CORPUS = Path("nano/corpus")
RUNS = Path("nano/runs")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves(name, *columns):
    """What the metrics of a training say, step by step."""
    rows = lines(RUNS / name / "metrics.jsonl")
    _, axes = plt.subplots(1, len(columns), figsize=(4.5 * len(columns), 3), squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.plot([row["step"] for row in rows], [row[column] for row in rows])
        axis.set(title=f"{name}: {column}", xlabel="step")
    plt.show()


# %% [markdown]
# ## Speech to learn from
#
# A closed domain: sums, capitals, colours, digits. Twelve voices ask, one answers.

# %%
recipe.run(to_step="corpus")
for name in ("tokenizer", "decoder"):
    clip = lines(CORPUS / f"{name}.jsonl")[0]
    print(clip["text"])
    display(Audio(str(CORPUS / clip["audio"])))

# %% [markdown]
# ## Speech tokenizer
#
# A causal encoder learns to recognise words through 256 codes, 12.5 a second. *Perplexity* is how many of the codes are
# really in use.

# %%
recipe.run(to_step="speech_tokenizer")
curves("speech_tokenizer", "asr_loss", "mel_loss", "perplexity")

# %% [markdown]
# ## Codes to sound
#
# A flow learns to make a mel spectrogram from codes, a vocoder to make sound from a mel.

# %%
recipe.run(to_step="vocoder")
curves("flow", "loss", "grad_norm")
curves("vocoder", "loss", "mel_loss")

# %% [markdown]
# ## Language model
#
# A small Qwen3 learns the domain in writing. Then its last layers are copied, one branch for text and one for speech:
# stage 1 trains what is new, stage 2 everything, SFT the conversation.

# %%
recipe.run(to_step="sft")
for name in ("text", "stage1", "stage2", "sft"):
    curves(name, "loss", "grad_norm")

# %% [markdown]
# ## Ask it
#
# After a tenth of the training do not expect to hear the right answer; the bundled nano, the whole recipe, is asked
# after it.

# %%
recipe.run(to_step="system")
question = moss_jax.Turn("user", text="What is two plus three?")
codes = 25 if QUICK else 100
for name, system in (("this one", moss_jax.load("nano/system")), ("the whole recipe", moss_jax.load())):
    written = system.reply([question], reply="text", max_new_tokens=codes)
    spoken = system.reply([question], max_new_tokens=codes)
    print(f"{name}: {written.text!r}")
    if spoken.wave.size:
        display(Audio(spoken.wave, rate=spoken.sample_rate))

# %% [markdown]
# From its own ears to its own voice: a recording as codes, and these codes as sound.

# %%
system = moss_jax.load("nano/system")
wave, rate = soundfile.read(CORPUS / lines(CORPUS / "decoder.jsonl")[0]["audio"], dtype="float32")
(codes,) = system.encode([(wave, rate)])
voice, _ = system.voice()
again = system.speech_decoder.decode(codes[:25] if QUICK else codes, voice)
display(Audio(wave, rate=rate), Audio(again, rate=system.speech_decoder.config.sample_rate))

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
# # Talk to nano
#
# Nano is a small MOSS-Speech model that comes with the package: 8 million parameters, trained from scratch on synthetic
# speech. It knows sums and differences up to twenty, ten capitals, eight colours, which of two numbers is greater, and
# how to repeat three digits. In this notebook you ask it in speech and listen to the answer. It runs on a CPU.

# %% [markdown]
# ## Install
#
# Run this notebook in a clone of the project. In Colab, clone or upload the project and set PROJECT to its folder.

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

PROJECT = next(
    (p for p in (Path.cwd(), Path.cwd().parent, Path("/content/moss_jax")) if (p / "setup.py").is_file()), None
)
if importlib.util.find_spec("moss_jax") is None:
    assert PROJECT, "the project was not found: clone it, then set PROJECT to its folder"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{PROJECT}[train]"], check=True)

# %%
import matplotlib.pyplot as plt
import numpy as np
import soundfile
from IPython.display import Audio, display

import moss_jax
from moss_jax.checkpoint.system_folder import NANO_FOLDER

system = moss_jax.load()  # without an argument: nano

# %% [markdown]
# ## Ask in speech
#
# The package contains a recording of "What is seven plus four?" in a voice that was not in the training data. You can
# replace it with the path of your own recording.

# %%
question = NANO_FOLDER / "question.wav"
display(Audio(str(question)))

# %%
reply = system.reply([moss_jax.Turn("user", audio=question)])
display(Audio(reply.wave, rate=reply.sample_rate))
print(f"{len(reply.codes)} codes, {reply.wave.size / reply.sample_rate:.2f} s of speech")


# %% [markdown]
# No text was generated: the question was encoded to codes, the language model replied with codes, and these were
# decoded to audio. The spectrograms of both:


# %%
def spectrogram(axis, wave, rate, title):
    axis.specgram(wave + 1e-6 * np.random.default_rng(0).normal(size=wave.size), NFFT=512, Fs=rate, noverlap=384)
    axis.set(title=title, xlabel="s", ylabel="Hz", ylim=(0, 8000))


_, (left, right) = plt.subplots(1, 2, figsize=(11, 3), sharey=True)
spectrogram(left, *soundfile.read(question), "question")
spectrogram(right, reply.wave, reply.sample_rate, "answer")
plt.show()

# %% [markdown]
# ## Continue the conversation
#
# A reply contains the conversation. The second question only makes sense after the first one.

# %%
second = system.reply([moss_jax.Turn("user", text="And plus one?")], conversation=reply.conversation)
display(Audio(second.wave, rate=second.sample_rate))

# %% [markdown]
# ## Speech and text
#
# Questions and answers can each be speech or text.

# %%
turns = {"spoken": moss_jax.Turn("user", audio=question), "written": moss_jax.Turn("user", text="What colour is snow?")}
for asked, turn in turns.items():
    for kind in ("speech", "text"):
        answer = system.reply([turn], reply=kind)
        content = answer.text if kind == "text" else f"{answer.wave.size / answer.sample_rate:.2f} s of speech"
        print(f"{asked} question, {kind} answer: {content}")

# %% [markdown]
# ## Streaming
#
# A stream yields pieces of audio before the answer is complete.

# %%
import time

stream = system.stream([moss_jax.Turn("user", audio=question)])
list(stream)  # the first call compiles

start = time.perf_counter()
pieces = []
stream = system.stream([moss_jax.Turn("user", audio=question)])
for piece in stream:
    pieces.append((time.perf_counter() - start, piece.wave.size / stream.sample_rate))
print(f"first audio after {1000 * pieces[0][0]:.0f} ms")
print(f"{sum(seconds for _, seconds in pieces):.2f} s of speech were ready after {pieces[-1][0]:.2f} s")
assert np.array_equal(stream.reply.codes, reply.codes)  # the same answer as without streaming

"""Packaging of moss_jax: `pip install .` on CPU, `pip install '.[cuda]'` or `'.[tpu]'` on an accelerator."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "moss_jax/__init__.py").read_text()).group(1)

M4A = ["av>=12"]  # m4a and webm; libsndfile, inside soundfile, reads the other containers
CONVERT = ["torch>=2.4,<2.14", "onnx>=1.16"]  # newer torch: not tried yet
TRAIN = [
    "optax>=0.2.8",
    "orbax-checkpoint>=0.11",
    "grain>=0.2.10",
    "array_record>=0.8",
    "tensorflow-datasets>=4.9.9",
    "matplotlib>=3.8",
    "librosa>=0.10",
]
SERVE = ["gradio>=6.31,<7", "matplotlib>=3.8", *M4A]  # browsers record webm
ESPEAK = ["espeakng-loader==0.2.4"]  # pinned: another release of espeak-ng sounds different
JUDGE = ["pocketsphinx>=5", "pesq>=0.0.4", "pystoi>=0.4", "jiwer>=3"]  # what hears and measures nano
TEST = [
    "pytest>=8",
    "pytest-xdist>=3",
    "hypothesis>=6",
    "ruff==0.17.*",
    "librosa>=0.10",
    "transformers>=4.51",
    "jupytext>=1.16",
    "nbclient>=0.10",
    "ipykernel>=6",
    "tensorboardX>=2.6",
    *M4A,
    *TRAIN,
    *SERVE,
    *ESPEAK,
    *JUDGE,
]

setup(
    name="moss-jax",
    version=VERSION,
    description="MOSS-Speech, speech in and speech out, in JAX: TPU-native, runs on CPU, GPU and TPU",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["moss_jax", "moss_jax.*"]),
    package_data={
        "moss_jax": ["assets/nano/*", "assets/nano/*/*", "recipes/nano/items/*", "recipes/nano/*.jsgf", "serve/page/*"]
    },
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "einops>=0.8",
        "filelock>=3.12",
        "numpy>=1.26",
        "pyyaml>=6",
        "safetensors>=0.5",
        "scipy>=1.11",
        "soundfile>=0.12",
        "tokenizers>=0.20",
        "huggingface_hub>=0.24",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "m4a": M4A,
        "train": TRAIN,
        "espeak": ESPEAK,
        "judge": JUDGE,
        "convert": CONVERT,
        "serve": SERVE,
        "test": TEST,
    },
    entry_points={"console_scripts": ["moss-jax = moss_jax.cli:main"]},
)

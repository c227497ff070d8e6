"""Nano's speech tokenizer: 1.1 million parameters, 256 codes, trained by word recognition.

  moss-jax train --config moss_jax/recipes/nano/configs/speech_tokenizer.py

About 22 minutes on two cores. The word error rate on held-out clips is in evaluations.jsonl; the export is
nano/runs/speech_tokenizer/exports/STEP/speech_tokenizer.
"""

from moss_jax.recipes.nano.sizes import SPEECH_TOKENIZER
from moss_jax.train import MeshSizes, Objective, OptimizerConfig, SpeechTokenizerRun

STEPS = 4500
RUN = SpeechTokenizerRun(
    name="nano-speech-tokenizer",
    folder="nano/runs/speech_tokenizer",
    model=SPEECH_TOKENIZER,
    data=("nano/corpus/tokenizer.jsonl",),
    held_out=("nano/corpus/tokenizer-valid.jsonl",),
    objective=Objective(layers=2, commitment_from=200),
    optimizer=OptimizerConfig(
        method="muon",
        learning_rate=3e-3,
        final_learning_rate=3e-5,
        warmup_steps=100,
        total_steps=STEPS,
        betas=(0.9, 0.98),
        weight_decay=0.01,
    ),
    buckets=(1.92, 2.56, 3.2, 5.12, 10.24),
    batch_size=8,
    steps=STEPS,
    mesh=MeshSizes(data=0, fsdp=1),
    save_every=250,
    evaluate_every=500,
    evaluate_batches=32,
    export_every=2500,
    log_every=50,
)

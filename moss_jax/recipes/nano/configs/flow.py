"""Nano's flow: speech codes -> mel, in one voice.

  moss-jax tokenize nano/corpus/decoder.jsonl --model SYSTEM --format decoder -o nano/data/voice
  moss-jax tokenize nano/corpus/decoder-valid.jsonl --model SYSTEM --format decoder -o nano/data/voice-valid
  moss-jax train --config moss_jax/recipes/nano/configs/flow.py

SYSTEM is the export of the speech tokenizer's run. About 8 minutes on two cores.
"""

from moss_jax.data import Mixture
from moss_jax.recipes.nano.sizes import SPEECH_DECODER
from moss_jax.train import FlowObjective, FlowRun, OptimizerConfig

STEPS = 2000
RUN = FlowRun(
    name="nano-flow",
    folder="nano/runs/flow",
    model=SPEECH_DECODER,
    system="nano/runs/speech_tokenizer",
    # A single voice needs neither prompt nor guidance. In such a short training the encoder needs a loss of its own.
    objective=FlowObjective(drop=0.0, prompt=0.0, chunks=(0, 5), prior=1.0),
    optimizer=OptimizerConfig(
        learning_rate=1e-3, final_learning_rate=1e-5, warmup_steps=100, total_steps=STEPS, weight_decay=0.01
    ),
    data=Mixture((("voice", "nano/data/voice", 1.0),)),
    held_out=Mixture((("voice", "nano/data/voice-valid", 1.0),)),
    codes=32,
    batch_size=8,
    steps=STEPS,
    ema_decay=0.998,
    export_dtype="float16",
    save_every=500,
    evaluate_every=500,
    evaluate_batches=8,
    log_every=50,
)

"""Supervised fine-tuning of the 8B model on one GPU: LoRA adapters on frozen bfloat16 weights.

  moss-jax train --config configs/sft_lora.py --init fnlp/MOSS-Speech --set system=SYSTEM
  moss-jax chat --model runs/sft_lora/exports/3000 QUESTION.wav -o ANSWER.wav

80 GB of memory hold 18 GB of weights, the adapters with their optimizer state, and one sequence at a time. Every export
has the adapters merged into the kernels.
Expect the result of configs/sft.py with a slightly higher loss.
Source: arXiv 2106.09685; rank and learning rate are our choice.
"""

from moss_jax.data import Mixture
from moss_jax.train import OptimizerConfig, Run
from moss_jax.train.speech_lm.lora import Lora
from moss_jax.train.speech_lm.stages import SFT, with_lora

STEPS = 3_000

RUN = Run(
    name="sft-lora-8b",
    folder="runs/sft_lora",
    init="runs/stage2",
    stage=with_lora(SFT, Lora(rank=16, alpha=32.0)),
    optimizer=OptimizerConfig(
        learning_rate=2e-4, final_learning_rate=2e-5, warmup_steps=50, total_steps=STEPS, weight_decay=0.0
    ),
    data=Mixture((("chat", "data/chat", 1.0),)),
    held_out=Mixture((("chat", "data/chat-valid", 1.0),)),
    context=10240,
    batch_size=8,
    accumulate=8,
    steps=STEPS,
    workers=2,
    save_every=100,
    evaluate_every=100,
    evaluate_batches=2,
    export_dtype="bfloat16",
)

"""Nano's vocoder: mel -> waveform, trained on the same recordings as `moss_jax/recipes/nano/configs/flow.py`.

  moss-jax train --config moss_jax/recipes/nano/configs/vocoder.py

Runs after the flow; its export is the flow's with the weights of this vocoder. About 11 minutes on two cores, without
discriminators.
"""

from moss_jax.data import Mixture
from moss_jax.recipes.nano.sizes import SPEECH_DECODER
from moss_jax.train import OptimizerConfig, VocoderObjective, VocoderRun

STEPS = 4000
RUN = VocoderRun(
    name="nano-vocoder",
    folder="nano/runs/vocoder",
    model=SPEECH_DECODER,
    system="nano/runs/flow",
    objective=VocoderObjective(mel=15.0, stft=10.0, f0=0.05, true_f0=0.5),
    optimizer=OptimizerConfig(
        learning_rate=2e-3, final_learning_rate=2e-5, warmup_steps=50, total_steps=STEPS, weight_decay=0.0
    ),
    data=Mixture((("voice", "nano/data/voice", 1.0),)),
    held_out=Mixture((("voice", "nano/data/voice-valid", 1.0),)),
    frames=24,
    batch_size=8,
    steps=STEPS,
    ema_decay=0.998,
    export_dtype="float16",
    save_every=500,
    evaluate_every=500,
    evaluate_batches=4,
    log_every=50,
)

"""The benchmark of the training step: both sides have the same losses; its timings are not tested."""

import pytest

from dev.bench import Options
from dev.bench.train import Ours, Peer, packed_batch, run
from moss_jax.errors import MossError
from moss_jax.speech_lm import TINY
from moss_jax.train.speech_lm.stages import STAGE_1, STAGE_2


def test_an_unknown_size_is_an_error():
    with pytest.raises(MossError, match="bench train: unknown size 'huge'"):
        next(run(Options("huge")))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [STAGE_1, STAGE_2])
def test_the_peer_has_the_same_losses(stage):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    batch = packed_batch(TINY, 2, 64)
    ours = Ours(TINY, stage, batch)
    peer = Peer(TINY, stage, batch, ours)
    for _ in range(3):  # the updates are the same as well
        assert abs(float(ours.step()) - peer.step()) < 1e-4

"""Arguments of `generation_settings`, seeds, and the sampler with accepted arguments: only allowed ids are drawn."""

from pathlib import Path

import jax
import numpy as np
from hypothesis import strategies as st

from moss_jax.arguments import check_seed
from moss_jax.dialogue.system import generation_settings
from moss_jax.generate.sampling import draw, filter_logits, penalise, request_keys

VOCABULARY = 16
FLOATS = st.one_of(
    st.floats(),
    st.floats(0, 2),
    st.sampled_from([1e-45, 1e-40, 1e-38, 1e-6, 1 - 1e-9, 1e38, 3.5e38, 1e300]),
)
ODD = st.one_of(
    FLOATS,
    st.integers(-2, 20),
    st.sampled_from([2**31, 2**32, 2**64, 10**400, 2.7, "a", "1", "", None, True, b"1", [1], (), {}, 1j]),
    st.sampled_from([np.float32(0.5), np.int64(3), np.float64("nan"), np.array([1]), np.array(2.0), np.bool_(True)]),
)
ARGUMENTS = {
    "temperature": st.one_of(FLOATS, ODD),
    "top_p": st.one_of(FLOATS, ODD),
    "repetition_penalty": st.one_of(FLOATS, ODD),
    "top_k": st.one_of(st.integers(0, 20), ODD),
    "greedy": st.one_of(st.booleans(), ODD),
    "max_new_tokens": st.one_of(st.integers(1, 600), ODD),
    "min_new_tokens": st.one_of(st.integers(0, 20), ODD),
}
CASES = st.fixed_dictionaries(
    {
        "arguments": st.fixed_dictionaries({}, optional=ARGUMENTS | {"top_q": ODD}),
        "logits": st.lists(
            st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, 1.0, -1e4, 1e4])),
            min_size=VOCABULARY,
            max_size=VOCABULARY,
        ),
        "forbidden": st.lists(st.booleans(), min_size=VOCABULARY - 1, max_size=VOCABULARY - 1),
        "seen": st.lists(st.booleans(), min_size=VOCABULARY, max_size=VOCABULARY),
        "seed": st.one_of(st.integers(0, 3), ODD),
    }
)


def run(case: dict, folder: Path) -> None:
    settings = generation_settings(**case["arguments"])
    seed = check_seed(case["seed"])
    logits = np.array([case["logits"]], np.float32)
    forbidden = np.array([*case["forbidden"], False])  # one id is always allowed
    seen = np.array([case["seen"]])
    for channel in (settings.text, settings.audio):
        scores = penalise(jax.numpy.asarray(logits), seen, forbidden, channel.repetition_penalty)
        assert not np.isnan(scores).any(), "NaN among the scores"
        if not channel.greedy:
            left = np.asarray(filter_logits(scores, channel))
            assert not np.isnan(left).any(), "NaN among the filtered logits"
            assert np.isfinite(left).any(), "no id is left"
            assert (left[0][forbidden] == -np.inf).all(), "a forbidden id is left"
        (drawn,) = np.asarray(draw(scores, request_keys(seed, 1), channel)).tolist()
        assert not forbidden[drawn], f"the forbidden id {drawn} was drawn"

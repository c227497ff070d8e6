"""Parity of generation: the rules of a reply, prompt grids, sampling distributions and whole replies."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dev.parity.golden import Golden, Mismatch
from dev.parity.transformer import read_config, split_params
from dev.reference import dialogue as reference
from moss_jax.convert.tables.speech_lm import ID_KEYS
from moss_jax.dialogue import grid
from moss_jax.dialogue.turns import Turn
from moss_jax.documents import parse_json
from moss_jax.errors import MossError
from moss_jax.generate import (
    ChannelSettings,
    GenerationSettings,
    decode_chunk,
    new_state,
    prefill,
    sampling,
    state_machine,
)
from moss_jax.generate.slots import positions_of
from moss_jax.speech_lm import TINY
from moss_jax.text.tokenizer import TextTokenizer


def fsm(golden: Golden) -> dict:
    """Component lm.fsm: the truth table of the reference's rules."""
    _no_weights(golden)
    config = read_config(golden)
    rows = golden.need("rows")
    text = rows[:, 0]
    audio = rows[:, 1]
    initial = reference.initial_mode(text, audio, config)
    modes = [reference.next_mode(np.full_like(text, mode), text, audio, config) for mode in (0, 1)]
    return {
        "initial_mode": initial,
        "mode_of_first_step": reference.next_mode(initial, text, audio, config),
        "next_mode": np.stack(modes, 1),
        "embedding_source": state_machine.embeds_audio(text, config).astype(np.int32),
        "stop": state_machine.stop_reason(text, config) != state_machine.RUNNING,
    }


def grids(golden: Golden) -> dict:
    """Component lm.grid: conversations to prompt grids, with the tokenizer.json in the folder of the file."""
    _no_weights(golden)
    try:
        ids = {ours: golden.config[theirs] for ours, theirs in ID_KEYS.items() if theirs in golden.config}
        ids.setdefault("endoftext_id", golden.config["pad_token_id"])
        sizes = {key: golden.config[key] for key in ("text_vocab_size", "audio_vocab_size")}
        config = replace(TINY, **ids, **sizes)
        path = golden.path.parent / golden.config["tokenizer_file"]
        text_tokenizer = TextTokenizer.from_file(path, config)
        processor_tokenizer = reference.ProcessorTokenizer.from_file(path, config)
        results = {}
        released_grids = []
        for case in _listed(golden, "conversations"):
            turns = [_turn(turn) for turn in case["conversation"]]
            reply = {"audio": "speech", "text": "text"}[case["output_modality"]]
            released = reference.with_processor_system(turns, reply)
            released_grids.append(np.concatenate(grid.prompt_pieces(released, reply, processor_tokenizer, config)))
            results[f"{case['name']}/grid_compat"] = released_grids[-1]
            # In the golden file the processor's own system turn is first; this package has the driver's there.
            if turns[0].role != "system":
                turns.insert(0, Turn("system", text=reference.PROCESSOR_SYSTEM_PROMPT[reply]))
            results[f"{case['name']}/grid_system_first"] = grid.prompt_grid(turns, reply, text_tokenizer, config)
    except (MossError, KeyError) as error:
        raise Mismatch(str(error)) from error
    batch, valid = grid.pad_left(released_grids, config)
    positions = positions_of(valid)
    return results | {"batch/grid": batch, "batch/attention_mask": valid, "batch/position_ids": positions}


def sampler(golden: Golden) -> dict:
    """Component lm.sampler: raw logits and a history to the distribution that ids are sampled from."""
    _no_weights(golden)
    config = read_config(golden)
    results = {}
    for case in _listed(golden, "steps"):
        name = case["name"]
        step = jnp.asarray(golden.need(f"{name}/generating_length"))
        history = golden.need(f"{name}/history")
        forbidden: dict[str, jax.Array | bool] = {
            "text": False,
            "audio": sampling.forbid_audio(step, case["min_new_tokens"], config),
        }
        for channel, branch in enumerate(forbidden):
            logits = jnp.asarray(golden.need(f"{name}/{branch}_logits"))
            settings = ChannelSettings(
                temperature=case["temperature"],
                top_p=case["top_p"],
                top_k=case["top_k"],
                repetition_penalty=case["repetition_penalty"],
            )
            ids = jnp.asarray(history)[None, :, channel]
            seen = sampling.seen_ids(ids, jnp.ones(ids.shape, bool), len(logits))
            scores = sampling.penalise(logits[None], seen, forbidden[branch], settings.repetition_penalty)
            results[f"{name}/{branch}_scores"] = np.maximum(scores[0], -1e30)  # how the file stores -inf
            results[f"{name}/{branch}_probs"] = jax.nn.softmax(sampling.filter_logits(scores, settings)[0])
    return results


def generate(golden: Golden) -> dict:
    """Component lm.generate: greedy replies by the compiled loop under the reference's rules, alone and as a batch."""
    if golden.contract.get("semantics") != "compat":
        raise Mismatch(f"contract 'semantics' is {golden.contract.get('semantics')!r}, expected 'compat'")
    config = read_config(golden)
    results: dict[str, Any] = {}
    params = split_params(golden, config)
    cases = _listed(golden, "cases")
    longest = max(value.shape[-2] for name, value in golden.inputs.items() if name.endswith("grid"))
    capacity = -(-(longest + max(case["max_new_tokens"] for case in cases)) // 64) * 64
    for case in cases:
        name = case["name"]
        if case.get("do_sample", False):
            raise Mismatch(f"case {name} is sampled; its draws are not in the file")
        if f"{name}/prompt_grid" in golden.inputs:
            rows = golden.need(f"{name}/prompt_grid")[None]
            valid = np.ones(rows.shape[:2], bool)
        else:
            rows = golden.need(f"{name}/grid")
            valid = golden.inputs.get(f"{name}/attention_mask", np.ones(rows.shape[:2])) != 0
        settings = _greedy(case)
        count = rows.shape[1]
        padding = (0, 0), (0, capacity - count)
        state = prefill(
            params,
            new_state(config, len(rows), capacity),
            np.pad(rows, (*padding, (0, 0))),
            np.pad(valid, padding),
            count,
            sampling.request_keys(0, len(rows)),
            config=config,
            rules=reference.RULES,
        )
        logits: dict[str, list[np.ndarray]] = {"text": [], "audio": []}
        for _ in range(len(golden.outputs.get(f"{name}/text_logits", ()))):
            state = decode_chunk(params, state, settings, 1, config=config, rules=reference.RULES)
            for branch, steps in logits.items():
                steps.append(np.asarray(state.logits[branch]))
        state = decode_chunk(params, state, settings, case["max_new_tokens"], config=config, rules=reference.RULES)
        lengths = np.asarray(state.lengths)
        generated = np.asarray(state.grid[:, count : int(state.filled)])
        if len(rows) > 1:
            expected = golden.outputs.get(f"{name}/grid", generated)
            missing = np.full((len(rows), max(0, expected.shape[1] - generated.shape[1]), 2), _padding(config))
            results |= {f"{name}/grid": np.concatenate([generated, missing], 1), f"{name}/lengths": lengths}
            continue
        results |= {
            f"{name}/grid": generated[0, : lengths[0]],
            f"{name}/mode": np.asarray(state.modes[0, count : count + lengths[0]]),
            f"{name}/stop_reason": state.stop[0],
        }
        results |= {f"{name}/{branch}_logits": np.stack(steps)[:, 0] for branch, steps in logits.items() if steps}
    return results


def _greedy(case: dict) -> GenerationSettings:
    channel = ChannelSettings(repetition_penalty=case["repetition_penalty"], greedy=True)
    lengths = {key: case[key] for key in ("max_new_tokens", "min_new_tokens")}
    return GenerationSettings(text=channel, audio=channel, **lengths)


def _padding(config):
    """The values of a row after the end of its reply, up to `max_new_tokens` rows in a golden file."""
    return np.array([config.endoftext_id, config.audio_pad_id], np.int32)


def _turn(turn: dict) -> Turn:
    content = turn["content"]
    return Turn(turn["role"], text=content) if isinstance(content, str) else Turn(turn["role"], codes=content["codes"])


def _listed(golden: Golden, key: str) -> list[dict]:
    try:
        return parse_json(golden.meta[key])
    except (KeyError, MossError) as error:
        raise Mismatch(f"metadata {key!r} is missing or not JSON") from error


def _no_weights(golden: Golden):
    if golden.weights:
        raise Mismatch(f"{golden.component} has no weights, but the file holds {', '.join(sorted(golden.weights))}")


COMPONENTS = {"lm.fsm": fsm, "lm.grid": grids, "lm.sampler": sampler, "lm.generate": generate}

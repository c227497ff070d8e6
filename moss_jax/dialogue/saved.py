"""Saved conversations: one safetensors file with the grid, the turns and the caches of a conversation.

Metadata: `format`, and `model`, the fingerprint of the weights that the caches were computed with. In FORMAT_1 that was
the fingerprint of one embedding row, which different models can share; from such a file only the rows are used, and
the caches are recomputed from them. The names of the tensors are the fields of GenerationState and Conversation.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.serialization import from_state_dict, to_state_dict

from moss_jax.checkpoint import open_tensors, save_tensors
from moss_jax.dialogue.turns import ROLES
from moss_jax.errors import MossError
from moss_jax.generate.slots import GenerationState, new_state, with_capacity
from moss_jax.generate.state_machine import AUDIO, ENDOFTEXT
from moss_jax.nn.tree import flatten, unflatten
from moss_jax.speech_lm import SpeechLMConfig

FORMAT = "moss-jax-conversation-2"
FORMAT_1 = "moss-jax-conversation-1"
TURNS = ("starts", "roles", "replies", "begin")  # the int32 arrays of a Conversation besides its state

Tensors = dict[str, np.ndarray]
Spec = tuple[tuple[int, ...], np.dtype]  # of a tensor: its shape and dtype


def write_conversation(path: str | Path, state: GenerationState, turns: Mapping[str, np.ndarray], model: str) -> None:
    """Writes one file, whole or not at all.

    Args:
        state: with B = 1.
        turns: the arrays in TURNS.
        model: fingerprint of the weights.

    Raises:
        MossError: the file cannot be written.
    """
    state = dataclasses.replace(state, logits={}, keys=jax.random.key_data(state.keys))
    state = with_capacity(jax.tree.map(np.asarray, state), int(state.filled))
    tensors = {"state": to_state_dict(state), **turns}
    save_tensors(path, flatten(tensors), {"format": FORMAT, "model": model})


def read_conversation(
    path: str | Path, config: SpeechLMConfig, context: int, models: Mapping[str, str]
) -> tuple[GenerationState, Tensors, bool]:
    """Reads the file that `write_conversation` wrote, and checks that its values are possible.

    Args:
        config, context: of the language model.
        models: its fingerprint in each format.

    Returns:
        The state (numpy, the capacity is the number of filled columns, no logits), the arrays in TURNS, and whether the
        caches are known to belong to these weights.

    Raises:
        MossError: not such a file, saved with another model, longer than the context, or damaged.
    """
    reader = open_tensors(path)
    version = reader.metadata.get("format")
    if not isinstance(version, str) or version not in models:
        raise MossError(f"{path}: not a saved conversation, its 'format' is {version!r:.80}")
    if reader.metadata.get("model") != models[version]:
        raise MossError(f"{path}: was saved with other weights, expected a conversation with this model")
    found = {name: (tuple(info.shape), np.dtype(info.dtype)) for name, info in reader.tensors.items()}
    expected, empty_state = _expected(found, config, context, path)
    if wrong := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
        raise MossError(f"{path}: damaged conversation, these do not fit: {', '.join(sorted(wrong))}")
    tensors = {name: np.array(reader.read(name)) for name in expected}
    if problem := _problem(tensors, config):
        raise MossError(f"{path}: damaged conversation, {problem}")
    nested = unflatten(tensors)
    nested["state"]["logits"] = {}
    return from_state_dict(empty_state, nested["state"]), {name: tensors[name] for name in TURNS}, version == FORMAT


def fingerprint_1(params: Any, config: SpeechLMConfig) -> str:
    """The fingerprint in FORMAT_1, of the text embedding of im_start."""
    row = np.asarray(params["text"]["embed"]["embedding"][config.im_start_id])
    return f"{zlib.crc32(row.tobytes()):08x}"


def _expected(
    found: Mapping[str, Spec], config: SpeechLMConfig, context: int, path: str | Path
) -> tuple[dict[str, Spec], GenerationState]:
    """The shape and dtype that each tensor should have, given the numbers of columns and turns; and such a state."""
    grid = found["state/grid"][0] if "state/grid" in found else ()
    columns = grid[1] if len(grid) == 3 else 1  # a grid of another rank is reported as misshapen
    if columns > context:
        raise MossError(f"{path}: has {columns} rows, expected at most the context of {context}")
    state = jax.eval_shape(lambda: new_state(config, 1, max(columns, 1)))
    state = dataclasses.replace(state, logits={}, keys=jax.eval_shape(jax.random.key_data, state.keys))
    starts = found["starts"][0] if "starts" in found else ()
    turns = starts if len(starts) == 1 and starts[0] else (1,)
    shapes = {"starts": turns, "roles": turns, "replies": (), "begin": ()}
    expected = {f"state/{name}": (tuple(x.shape), x.dtype) for name, x in flatten(to_state_dict(state)).items()}
    return expected | {name: (shape, np.dtype(np.int32)) for name, shape in shapes.items()}, state


def _problem(tensors: Tensors, config: SpeechLMConfig) -> str | None:
    """The first value that no conversation can have, or None. Shapes and dtypes are right already."""
    state = {name.removeprefix("state/"): x for name, x in tensors.items() if name.startswith("state/")}
    starts = tensors["starts"]
    roles = tensors["roles"]
    columns = state["grid"].shape[1]
    begin = int(tensors["begin"])
    replies = int(tensors["replies"])
    text = state["grid"][0, :, 0]
    audio = state["grid"][0, :, 1]
    length = columns - begin  # of the latest reply
    rules = {
        f"filled is {state['filled']}, expected {columns}": state["filled"] == columns,
        "a text id is out of range": _within(text, 0, config.text_vocab_size - 1),
        "an audio id is out of range": _within(audio, 0, config.audio_vocab_size - 1),
        "a row is marked as padding": state["valid"].all(),
        "a role is unknown": _within(roles, 0, len(ROLES) - 1),
        f"replies is {replies}, expected at least 1": replies >= 1,
        f"begin is {begin}, expected 1 to {columns}": 1 <= begin <= columns,
        "the turns do not begin one after the other": starts[0] == 0
        and (np.diff(starts) > 0).all()
        and starts[-1] < begin,
        "the latest turn is not the assistant's": roles[-1] == ROLES.index("assistant"),
        f"the latest reply is not {length} rows long": state["lengths"][0] == length and state["step"] == length,
        "a mode is unknown": _within(state["modes"], 0, AUDIO) and _within(state["mode"], 0, AUDIO),
        "the reason for the end is unknown": _within(state["stop"], 0, ENDOFTEXT),
        "more columns are done than there are": all(
            _within(x, 0, columns) for name, x in state.items() if name.startswith("done/")
        ),
        "a cache has values that are not finite": all(
            np.isfinite(x.astype(np.float32)).all()
            for name, x in state.items()
            if name == "hidden" or name.startswith("caches/")
        ),
    }
    return next((problem for problem, right in rules.items() if not right), None)


def _within(x: np.ndarray, lowest: int, highest: int) -> bool:
    return bool(((x >= lowest) & (x <= highest)).all())

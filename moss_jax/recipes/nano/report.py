"""The report on nano, or on any other system: every figure from the same items, with its ceiling and its controls.

    OUT/results.jsonl     a line an item and measurement: what was heard, whether it is right
        table.md, .json   the report
        items/, waves/    what was asked, and what the system said

Questions are asked in four ways (spoken or written question, spoken or written answer: ss, st, ts, tt). An answer is
right when it is the right sentence, word for word; a spoken one is heard by the judge. In two turns the second answer
counts, after the system's own first one. Spoken questions are also answered one by one, in one piece and streamed: the
codes must be the same, and how soon the first sound comes is measured. Some are asked as a microphone may have them:
quiet, in noise, between pauses.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moss_jax.audio.wave import load_audio, resample, save_audio
from moss_jax.checkpoint import atomic_folder, open_tensors
from moss_jax.dialogue.system import Reply
from moss_jax.dialogue.turns import Turn
from moss_jax.errors import MossError
from moss_jax.evaluate.items import ContentPart
from moss_jax.evaluate.model import EvaluatedModel
from moss_jax.evaluate.results import Results, accuracy_row, file_hash, markdown_table, write_table
from moss_jax.evaluate.words import words
from moss_jax.recipes.nano.corpus import Room
from moss_jax.recipes.nano.items import FOLDER, SETS, Item, read_items, speak_items
from moss_jax.recipes.nano.judge import NanoJudge

Pairs = list[tuple[Item, dict[str, list[Path]]]]
WAYS = ("ss", "st", "ts", "tt")
TOLD = {"s": "S", "t": "T"}
UNTRAINED = 100  # items of that control
STREAMED = 200  # items that are answered one by one, in one piece and streamed
SAMPLING = {"greedy": True, "repetition_penalty": 1.0, "max_new_tokens": 64}
# How else some questions are recorded, and how that is told; they are answered in writing, which no judge has to hear.
ROOMS = {
    "quiet": ("15 dB quieter", Room(level=-15, above_noise=60)),
    "noisy": ("in noise, 30 dB below the voice", Room(level=0, above_noise=30)),
    "slow": ("a second before and after", Room(level=0, above_noise=40, before=1, after=1)),
}
IN_ROOMS = 100  # items, spread over the set
# the sets whose answers go through the codec alone
RESYNTHESIS = "voices"
SENTENCES = "sentences"
QUALITY_RATE = 16000  # Hz, of wide-band PESQ and of STOI


def run(
    model: EvaluatedModel,
    out: str | Path,
    *,
    sets: Sequence[str] = tuple(SETS),
    ways: Sequence[str] = WAYS,
    limit: int | None = None,
    replies_only: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Measures a system; returns the table. The same call goes on where an interrupted one stopped.

    Args:
        sets: keys of `data.nano.items.SETS`.
        ways: of WAYS.
        limit: so many items of each set, spread over it; None for all.
        replies_only: without ceiling, codec, vocoder, controls and streaming: where many models are compared.

    Raises:
        MossError: espeak-ng or the extra `judge` is missing, an unknown set or way, a system that cannot answer.
    """
    for name, given, known in (("sets", sets, SETS), ("ways", ways, WAYS)):
        if not given or (unknown := sorted(set(given) - set(known))):
            raise MossError(f"{name}: {', '.join(unknown) if given else 'none'}, expected some of {', '.join(known)}")
    if limit is not None and limit < 1:
        raise MossError(f"items: {limit}, expected at least 1")
    judge = NanoJudge()
    about = {
        "task": "nano",
        "judge": judge.name,
        "items": file_hash(FOLDER),
        "sampling": SAMPLING,
        "codec": model.codec_hash(),
        "model": model.language_model_hash(),
    }
    with Results(out, about) as results:
        work = _Work(model, judge, results, sets, ways, limit, say)
        work.run(replies_only)
        return write_table(results.folder, *_tables(results.done.values(), work))


class _Work:
    def __init__(self, model, judge, results, sets, ways, limit, say):
        self.model = model
        self.judge = judge
        self.results = results
        self.say = say
        self.ways = ways
        self.folder = results.folder
        self.items = {group: _spread(read_items(group), limit) for group in SETS if group in sets}

    def run(self, replies_only: bool) -> None:
        self.spoken = {group: speak_items(group, self.folder / "items", items) for group, items in self.items.items()}
        if not replies_only:
            self._parts()
        for group in self.items:
            if group != SENTENCES:
                for way in self.ways:
                    self._replies(self.model, way, group, way)
        if not replies_only and RESYNTHESIS in self.items and "ss" in self.ways:
            self._untrained()
            self._each("stream", RESYNTHESIS, self._stream, STREAMED)
        if not replies_only and RESYNTHESIS in self.items and "st" in self.ways:
            for name in ROOMS:
                self._replies(self.model, name, RESYNTHESIS, "st", self._recorded(name))

    def _parts(self) -> None:
        """What bounds the replies: the judge, the codec, the vocoder."""
        for group in self.items:
            self._each("ceiling", group, self._ceiling)
        for group in (RESYNTHESIS, SENTENCES):
            self._each("codec", group, self._codec)
        self._each("vocoder", SENTENCES, self._vocoder)

    def _untrained(self) -> None:
        untrained = self.folder / "untrained"
        if not untrained.exists():
            shuffle_weights(self.model.system.folder.path, untrained)
        other = EvaluatedModel(untrained, batch_size=self.model.batch_size)
        self._replies(other, "untrained", RESYNTHESIS, "ss", self._pairs(RESYNTHESIS)[:UNTRAINED])

    def _pairs(self, group: str) -> Pairs:
        return list(zip(self.items.get(group, ()), self.spoken.get(group, ()), strict=True))

    def _recorded(self, name: str) -> Pairs:
        """Some questions of the unseen voices, recorded in a room."""
        _, room = ROOMS[name]
        place = self.folder / "items" / f"{RESYNTHESIS}-{name}"
        place.mkdir(parents=True, exist_ok=True)
        recorded = []
        for number, (item, paths) in enumerate(_spread(self._pairs(RESYNTHESIS), IN_ROOMS)):
            (path,) = paths["questions"]
            if not (place / path.name).exists():
                wave, rate = load_audio(path)
                save_audio(place / path.name, room.record(wave, rate, number), rate)
            recorded.append((item, {"questions": [place / path.name]}))
        return recorded

    def _each(
        self,
        part: str,
        group: str,
        measure: Callable[[Item, dict[str, list[Path]]], dict[str, Any]],
        limit: int | None = None,
    ) -> None:
        """One measurement of every item of a set that has not been taken yet."""
        pairs = self._pairs(group)[:limit]
        for number, (item, paths) in enumerate(pairs, 1):
            name = f"{part}/{item.name}"
            if name not in self.results.done:
                record = {"id": name, "part": part, "group": group, "kind": item.kind}
                self.results.append([record | measure(item, paths)])
                self.say(f"{part}, {SETS[group]}: {number} of {len(pairs)}")

    def _ceiling(self, item: Item, paths: dict[str, list[Path]]) -> dict[str, Any]:
        return self._judged(*load_audio(paths["answers"][-1]), item.answers[-1])

    def _codec(self, item: Item, paths: dict[str, list[Path]]) -> dict[str, Any]:
        """The answering voice -> codes -> sound."""
        sound = ContentPart(audio=paths["answers"][-1])
        codes = self.model.codes([sound])[sound]
        voice, _ = self.model.system.voice()
        decoder = self.model.system.speech_decoder
        wave = decoder.decode(codes, voice)
        self._keep("codec", item, wave, decoder.config.sample_rate)
        return self._judged(wave, decoder.config.sample_rate, item.answers[-1])

    def _stream(self, item: Item, paths: dict[str, list[Path]]) -> dict[str, Any]:
        """The same question in one piece and streamed; times are from the whole question to sound."""
        turns = [Turn("user", audio=paths["questions"][0])]
        system = self.model.system
        whole = system.reply(turns, **SAMPLING)
        begin = time.perf_counter()
        first = None
        waves = []
        stream = system.stream(turns, **SAMPLING)
        for piece in stream:
            if piece.wave.size and first is None:
                first = time.perf_counter() - begin
            waves.append(piece.wave)
        spent = time.perf_counter() - begin
        wave = np.concatenate(waves)
        codes = stream.reply.codes
        same = min(len(codes), len(whole.codes))
        differ = int((codes[:same] != whole.codes[:same]).sum()) + abs(len(codes) - len(whole.codes))
        judged = {name: self._answer(item, 0, reply, "ss") for name, reply in (("own", stream.reply), ("whole", whole))}
        return judged["own"] | {
            "whole": judged["whole"]["right"],
            "differ": differ,
            "codes": len(codes),
            "first": first,
            "spent": spent,
            "seconds": wave.size / stream.sample_rate,
        }

    def _vocoder(self, item: Item, paths: dict[str, list[Path]]) -> dict[str, Any]:
        """True mel -> sound, beside the sound that it was computed from."""
        import jax.numpy as jnp

        from moss_jax.audio.features import mel_24k
        from moss_jax.speech_decoder.decoder import vocode

        wave, rate = load_audio(paths["answers"][-1])
        decoder = self.model.system.speech_decoder
        room = np.pad(wave, (0, -len(wave) % rate))  # whole seconds: few lengths to compile for
        mel = np.asarray(mel_24k(jnp.asarray(room[None]), jnp.array([len(wave)])))[0]
        made = vocode(decoder.vocoder_params, decoder.vocoder_config, mel[: len(wave) // decoder.vocoder_config.hop], 0)
        self._keep("vocoder", item, made, rate)
        return quality(wave[: len(made)], made[: len(wave)], rate)

    def _replies(self, model: EvaluatedModel, part: str, group: str, way: str, pairs: Pairs | None = None) -> None:
        """Asks the items of a set one way, or some of them; batch by batch, both turns."""
        pairs = self._pairs(group) if pairs is None else pairs
        left = [(item, paths) for item, paths in pairs if f"{part}/{item.name}" not in self.results.done]
        for first in range(0, len(left), model.batch_size):
            batch = left[first : first + model.batch_size]
            records = []
            for (item, _), replies in zip(batch, self._asked(model, batch, way), strict=True):
                record = {"id": f"{part}/{item.name}", "part": part, "group": group, "kind": item.kind}
                judged = [self._answer(item, turn, reply, way) for turn, reply in enumerate(replies)]
                if way[1] == "s" and replies[-1].wave.size:
                    self._keep(part, item, replies[-1].wave, replies[-1].sample_rate)
                whole = len(replies) == len(item.questions)
                records.append(
                    record
                    | judged[-1]
                    | {
                        "right": whole and judged[-1]["right"],
                        "first": judged[0]["right"],
                        "complete": replies[-1].complete,
                        "codes": len(replies[-1].codes),
                    }
                )
            self.results.append(records)
            self.say(f"{part}, {SETS[group]}: {len(pairs) - len(left) + first + len(batch)} of {len(pairs)}")

    def _asked(self, model: EvaluatedModel, batch: Sequence[tuple[Item, dict]], way: str) -> list[list[Reply]]:
        """The replies to each turn of some items; a dialogue ends where a reply is empty."""
        turns = [[] for _ in batch]
        replies: list[list[Reply]] = [[] for _ in batch]
        for number in range(max(len(item.questions) for item, _ in batch)):
            going = [
                i
                for i, (item, _) in enumerate(batch)
                if number < len(item.questions) and len(replies[i]) == number and _can_go_on(replies[i], way)
            ]
            for i in going:
                item, paths = batch[i]
                if replies[i]:
                    last = replies[i][-1]
                    turns[i].append(
                        Turn("assistant", codes=last.codes) if way[1] == "s" else Turn("assistant", text=last.text)
                    )
                asked = {"audio": paths["questions"][number]} if way[0] == "s" else {"text": item.questions[number]}
                turns[i].append(Turn("user", **asked))
            if going:
                answers = model.system.reply_batch(
                    [turns[i] for i in going],
                    reply="speech" if way[1] == "s" else "text",
                    batch_size=model.batch_size,
                    **SAMPLING,
                )
                for i, answer in zip(going, answers, strict=True):
                    replies[i].append(answer)
        return replies

    def _answer(self, item: Item, turn: int, reply: Reply, way: str) -> dict[str, Any]:
        answer = item.answers[turn]
        if way[1] == "t":
            return {"said": reply.text, "right": words(reply.text) == words(answer)}
        if not reply.wave.size:
            return {"said": "", "refused": "no speech", "right": False}
        return self._judged(reply.wave, reply.sample_rate, answer)

    def _judged(self, wave: np.ndarray, rate: int, answer: str) -> dict[str, Any]:
        heard = self.judge.hear(wave, rate)
        return {"said": heard.text, "refused": heard.refused, "right": heard.says(answer)}

    def _keep(self, part: str, item: Item, wave: np.ndarray, rate: int) -> None:
        place = self.folder / "waves" / part
        place.mkdir(parents=True, exist_ok=True)
        save_audio(place / f"{item.name}.wav", wave, rate)


def _spread(items: Sequence[Any], limit: int | None) -> list[Any]:
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _can_go_on(replies: Sequence[Reply], way: str) -> bool:
    return not replies or (len(replies[-1].codes) > 0 if way[1] == "s" else bool(replies[-1].text.strip()))


def quality(reference: np.ndarray, made: np.ndarray, rate: int) -> dict[str, Any]:
    """Wide-band PESQ (ITU-T P.862.2) and STOI of a sound, beside what it should be; at 16 kHz."""
    try:
        from pesq import NoUtterancesError, pesq
        from pystoi import stoi
    except ImportError as error:
        raise MossError("the vocoder's quality needs pesq and pystoi: pip install 'moss-jax[judge]'") from error
    reference, made = (resample(wave, rate, QUALITY_RATE) for wave in (reference, made))
    try:
        score = float(pesq(QUALITY_RATE, reference, made, "wb"))
    except NoUtterancesError:  # silence
        score = 1.0
    return {"pesq": score, "stoi": float(stoi(reference, made, QUALITY_RATE))}


def shuffle_weights(folder: Path, out: Path, seed: int = 0) -> None:
    """A control: the same system in which the values of every parameter stand in random order."""
    from safetensors.numpy import save_file

    random_order = np.random.default_rng(seed)
    with atomic_folder(out) as part:
        for path in sorted(Path(folder).rglob("*")):
            place = part / path.relative_to(folder)
            if path.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            elif path.suffix == ".safetensors" and "voices" not in path.parts:
                reader = open_tensors(path)
                shuffled = {
                    name: random_order.permutation(reader.read(name).reshape(-1)).reshape(info.shape)
                    for name, info in reader.tensors.items()
                }
                save_file(shuffled, place, reader.metadata or None)
            elif path.is_file():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(path.read_bytes())


def _tables(records: Sequence[Mapping[str, Any]], work: _Work) -> tuple[list[dict[str, Any]], list[str]]:
    wanted = {group: {item.name for item in items} for group, items in work.items.items()}
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for record in records:
        name = record["id"].partition("/")[2]
        if name in wanted.get(record["group"], ()):
            found.setdefault((record["part"], record["group"]), {})[name] = record
    rows = list(_rows(found, work))
    notes = [f"Judge: {work.judge.name}. An answer is right word for word; intervals are Wilson's, 95%."]
    if budget := _budget(found):
        notes.append("Where answers are lost (unseen voices):\n\n" + markdown_table(budget))
    if ("vocoder", SENTENCES) in found:
        notes.append("Vocoder, true mel to sound, unseen sentences:\n\n" + markdown_table(_vocoder_rows(found)))
    if ("stream", RESYNTHESIS) in found:
        notes.append(_streamed(list(found["stream", RESYNTHESIS].values())))
    if ("ss", RESYNTHESIS) in found:
        notes.append("Spoken to spoken by kind (unseen voices):\n\n" + markdown_table(list(_kind_rows(found))))
        cut = sum(not record["complete"] for record in found["ss", RESYNTHESIS].values())
        refused = sum(bool(record["refused"]) for record in found["ss", RESYNTHESIS].values())
        notes.append(f"Of these, cut off: {cut}; refused by the judge's checks: {refused}.")
    return rows, notes


def _rows(found: Mapping, work: _Work) -> Iterator[dict[str, Any]]:
    def right(part: str, group: str) -> list[bool]:
        return [record["right"] for record in found[part, group].values()]

    for group in work.items:
        if ("ceiling", group) in found:
            yield accuracy_row(f"judge's ceiling, {SETS[group]}", right("ceiling", group))
        if ("codec", group) in found:
            yield accuracy_row(f"codec: codes -> speech, {SETS[group]}", right("codec", group))
        for way in work.ways:
            if (way, group) in found:
                yield accuracy_row(f"{TOLD[way[0]]}->{TOLD[way[1]]}, {SETS[group]}", right(way, group))
    for name, (told, _) in ROOMS.items():
        if (name, RESYNTHESIS) in found:
            yield accuracy_row(f"S->T, {SETS[RESYNTHESIS]}, {told}", right(name, RESYNTHESIS))
    if ("untrained", RESYNTHESIS) in found:
        yield accuracy_row("control: S->S, weights in random order", right("untrained", RESYNTHESIS))
    for part, told in (("ceiling", "the answering voice"), ("ss", "S->S")):
        if (part, RESYNTHESIS) in found:
            heard = found[part, RESYNTHESIS]
            items = {item.name: item for item in work.items[RESYNTHESIS]}
            yield accuracy_row(f"control: {told}, answers shuffled", _against(heard, items, _shuffled(items)))
            if part == "ss":
                yield accuracy_row("control: S->S, another question of the kind", _against(heard, items, _next(items)))


def _against(heard: Mapping[str, Mapping], items: Mapping[str, Item], other: Mapping[str, str]) -> list[bool]:
    """What was heard for each item, held against the answer to another one."""
    return [
        not record.get("refused") and words(record["said"]) == words(items[other[name]].answers[-1])
        for name, record in heard.items()
    ]


def _shuffled(items: Mapping[str, Item]) -> dict[str, str]:
    names = list(items)
    order = random.Random(0).sample(names, len(names))
    return {name: order[(order.index(name) + 1) % len(order)] for name in names}  # nobody keeps its own


def _next(items: Mapping[str, Item]) -> dict[str, str]:
    """The next item of the same kind with another answer (of any kind, where all are answered alike)."""
    names = list(items)
    found = {}
    for i, name in enumerate(names):
        own = items[name]
        others = [other for other in names[i + 1 :] + names[:i] if items[other].answers[-1] != own.answers[-1]]
        found[name] = next((other for other in others if items[other].kind == own.kind), others[0] if others else name)
    return found


def _budget(found: Mapping) -> list[dict[str, Any]]:
    """Shares that multiply to spoken-to-spoken: what the text model knows, what is lost in hearing, in speaking."""
    parts = [
        ("tt", RESYNTHESIS),
        ("st", RESYNTHESIS),
        ("ss", RESYNTHESIS),
        ("ceiling", RESYNTHESIS),
        ("codec", RESYNTHESIS),
    ]
    if any(part not in found for part in parts):
        return []
    share = {part: float(np.mean([record["right"] for record in found[part, group].values()])) for part, group in parts}

    def over(a: float, b: float) -> float | str:
        return round(100 * a / b, 1) if b else "-"

    rows = [
        ("knowing: T->T", over(share["tt"], 1)),
        ("hearing (speech tokenizer, LM): S->T over T->T", over(share["st"], share["tt"])),
        ("saying the codes (LM): S->S over S->T, codec and judge", over(share["ss"], share["st"] * share["codec"])),
        ("codec: resynthesis over the ceiling", over(share["codec"], share["ceiling"])),
        ("judge: the ceiling", over(share["ceiling"], 1)),
        ("all together: S->S", over(share["ss"], 1)),
    ]
    return [{"part": part, "kept %": kept} for part, kept in rows]


def _streamed(records: Sequence[Mapping[str, Any]]) -> str:
    codes = sum(r["codes"] for r in records)
    differ = sum(r["differ"] for r in records)
    right = [
        accuracy_row(told, [r[key] for r in records])
        for told, key in (("S->S in one piece", "whole"), ("S->S streamed", "right"))
    ]
    spoken = [r for r in records if r["first"] is not None]
    told = (
        f"Streamed beside one piece, question by question: {differ} of {codes} codes differ.\n\n{markdown_table(right)}"
    )
    if not spoken:
        return told
    first = 1000 * np.array([r["first"] for r in spoken])
    factors = np.array([r["spent"] / r["seconds"] for r in spoken])
    rows = [
        {
            "what": what,
            "median": f"{np.median(values):.{digits}f}",
            "95th percentile": f"{np.percentile(values, 95):.{digits}f}",
        }
        for what, values, digits in (("first sound after the question, ms", first, 0), ("real-time factor", factors, 2))
    ]
    return f"{told}\n\n{markdown_table(rows)}"


def _vocoder_rows(found: Mapping) -> list[dict[str, Any]]:
    rows = []
    for key, told in (("pesq", "PESQ-wb"), ("stoi", "STOI")):
        values = np.array([record[key] for record in found["vocoder", SENTENCES].values()])
        middle = values.mean()
        half = 1.96 * values.std() / len(values) ** 0.5
        told_row = {"what": told, "items": len(values)}
        numbers = {"mean": middle, "95% from": middle - half, "95% to": middle + half}
        rows.append(told_row | {key: round(float(value), 3) for key, value in numbers.items()})
    return rows


def _kind_rows(found: Mapping) -> Iterator[dict[str, Any]]:
    kinds: dict[str, list[bool]] = {}
    for record in found["ss", RESYNTHESIS].values():
        kinds.setdefault(record["kind"], []).append(record["right"])
    for kind, right in kinds.items():
        yield accuracy_row(kind, right)

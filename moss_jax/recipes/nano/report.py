"""The evaluation report of nano, or of another system on nano's items, with ceilings and controls.

    OUT/results.jsonl     a line per item and measurement: the recognised words, whether they are right
        table.md, .json   the report
        items/, waves/    recordings of the questions and of the answers

Questions are asked in four ways: spoken or written (s, t), with a spoken or written answer. An answer is right if it is
the right sentence, word for word; spoken answers are transcribed by the judge. In dialogues of two turns the second
answer is judged, after the system's own first one. Spoken questions are also answered one at a time, as a whole and
streamed: the codes must be the same, and the time until the first sound is measured. Some spoken questions are recorded
under other conditions: quieter, in noise, with pauses.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moss_jax.audio.wave import load_audio, resample, save_audio
from moss_jax.checkpoint import open_tensors
from moss_jax.dialogue.reply import Reply
from moss_jax.dialogue.turns import Turn
from moss_jax.errors import MossError
from moss_jax.evaluate.items import ContentPart
from moss_jax.evaluate.model import EvaluatedModel
from moss_jax.evaluate.results import Results, accuracy_row, file_hash, markdown_table, write_table
from moss_jax.files import atomic_folder
from moss_jax.progress import Say, silent
from moss_jax.recipes.nano.corpus import MODALITIES
from moss_jax.recipes.nano.items import ITEMS_FOLDER, SETS, Item, read_items, synthesize_items
from moss_jax.recipes.nano.judge import NanoJudge
from moss_jax.recipes.nano.recordings import RecordingConditions
from moss_jax.text.words import normalized_words

T = TypeVar("T")
Paths = dict[str, list[Path]]  # recordings of "questions" and "answers"
ItemRecordings = list[tuple[Item, Paths]]
Record = Mapping[str, Any]  # a line of results.jsonl
Records = Mapping[tuple[str, str], Mapping[str, Record]]  # (part, set) -> item name -> its record
UNTRAINED_ITEMS = 100  # of the control with random weights
STREAMED_ITEMS = 200  # that are answered one at a time, as a whole and streamed
SAMPLING: dict[str, Any] = {"greedy": True, "repetition_penalty": 1.0, "max_new_tokens": 64}
# Other recording conditions and their titles in the report. Answers are written, so that no judge is needed.
CONDITIONS = {
    "quiet": ("15 dB quieter", RecordingConditions(level=-15, signal_to_noise=60)),
    "noisy": ("in noise, 30 dB below the voice", RecordingConditions(level=0, signal_to_noise=30)),
    "slow": ("a second before and after", RecordingConditions(level=0, signal_to_noise=40, before=1, after=1)),
}
CONDITION_ITEMS = 100  # per condition, spread over the set
# The sets whose answers are resynthesised by the codec; the first is also that of all controls.
RESYNTHESIS = "voices"
SENTENCES = "sentences"
QUALITY_RATE = 16000  # Hz, of wide-band PESQ and of STOI


def run(
    model: EvaluatedModel,
    out: str | Path,
    *,
    sets: Sequence[str] = tuple(SETS),
    ways: Sequence[str] = MODALITIES,
    limit: int | None = None,
    replies_only: bool = False,
    say: Say = silent,
) -> str:
    """Evaluates a system; returns the table. The same call resumes an interrupted evaluation.

    Args:
        sets: keys of `moss_jax.recipes.nano.items.SETS`.
        ways: "ss", "st", "ts", "tt": question and answer, spoken (s) or written (t).
        limit: items per set, spread over it; None: all.
        replies_only: leave out ceiling, codec, vocoder, controls and streaming, to compare many models.

    Raises:
        MossError: espeak-ng or the extra `judge` is missing, an unknown set or way, or a system that cannot answer.
    """
    for name, given, known in (("sets", sets, SETS), ("ways", ways, MODALITIES)):
        if not given or (unknown := sorted(set(given) - set(known))):
            raise MossError(f"{name}: {', '.join(unknown) if given else 'none'}, expected some of {', '.join(known)}")
    if limit is not None and limit < 1:
        raise MossError(f"items: {limit}, expected at least 1")
    judge = NanoJudge()
    about = {
        "task": "nano",
        "judge": judge.name,
        "items": file_hash(ITEMS_FOLDER),
        "sampling": SAMPLING,
        "codec": model.codec_hash(),
        "model": model.language_model_hash(),
    }
    with Results(out, about) as results:
        evaluation = _Evaluation(model, judge, results, sets, ways, limit, say)
        evaluation.run(replies_only)
        return write_table(results.folder, *_tables(list(results.done.values()), evaluation))


class _Evaluation:
    def __init__(
        self,
        model: EvaluatedModel,
        judge: NanoJudge,
        results: Results,
        sets: Sequence[str],
        ways: Sequence[str],
        limit: int | None,
        say: Say,
    ):
        self.model = model
        self.judge = judge
        self.results = results
        self.say = say
        self.ways = ways
        self.folder = results.folder
        self.items = {group: _spread(read_items(group), limit) for group in SETS if group in sets}

    def run(self, replies_only: bool) -> None:
        self.recordings = {
            group: synthesize_items(group, self.folder / "items", items) for group, items in self.items.items()
        }
        if not replies_only:
            self._parts()
        for group in self.items:
            if group != SENTENCES:
                for way in self.ways:
                    self._replies(self.model, way, group, way)
        if not replies_only and RESYNTHESIS in self.items and "ss" in self.ways:
            self._untrained()
            self._measure("stream", RESYNTHESIS, self._stream, STREAMED_ITEMS)
        if not replies_only and RESYNTHESIS in self.items and "st" in self.ways:
            for name in CONDITIONS:
                self._replies(self.model, name, RESYNTHESIS, "st", self._recorded_under(name))

    def _parts(self) -> None:
        """What limits the spoken replies: judge, codec and vocoder."""
        for group in self.items:
            self._measure("ceiling", group, self._ceiling)
        for group in (RESYNTHESIS, SENTENCES):
            self._measure("codec", group, self._codec)
        self._measure("vocoder", SENTENCES, self._vocoder)

    def _untrained(self) -> None:
        untrained = self.folder / "untrained"
        if not untrained.exists():
            shuffle_weights(self.model.system.folder.path, untrained)
        other = EvaluatedModel(untrained, batch_size=self.model.batch_size)
        self._replies(other, "untrained", RESYNTHESIS, "ss", self._item_recordings(RESYNTHESIS)[:UNTRAINED_ITEMS])

    def _item_recordings(self, group: str) -> ItemRecordings:
        return list(zip(self.items.get(group, ()), self.recordings.get(group, ()), strict=True))

    def _recorded_under(self, name: str) -> ItemRecordings:
        """Some questions in unseen voices, recorded under one of CONDITIONS."""
        _, conditions = CONDITIONS[name]
        folder = self.folder / "items" / f"{RESYNTHESIS}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        recorded: ItemRecordings = []
        for number, (item, paths) in enumerate(_spread(self._item_recordings(RESYNTHESIS), CONDITION_ITEMS)):
            (path,) = paths["questions"]
            if not (folder / path.name).exists():
                wave, rate = load_audio(path)
                save_audio(folder / path.name, conditions.record(wave, rate, number), rate)
            recorded.append((item, {"questions": [folder / path.name]}))
        return recorded

    def _measure(
        self, part: str, group: str, measure: Callable[[Item, Paths], dict[str, Any]], limit: int | None = None
    ) -> None:
        """Takes one measurement of every item of a set, unless results.jsonl has it."""
        pairs = self._item_recordings(group)[:limit]
        for number, (item, paths) in enumerate(pairs, 1):
            name = f"{part}/{item.name}"
            if name not in self.results.done:
                record = {"id": name, "part": part, "group": group, "kind": item.kind}
                self.results.append([record | measure(item, paths)])
                self.say(f"{part}, {SETS[group]}: {number} of {len(pairs)}")

    def _ceiling(self, item: Item, paths: Paths) -> dict[str, Any]:
        return self._judged(*load_audio(paths["answers"][-1]), item.answers[-1])

    def _codec(self, item: Item, paths: Paths) -> dict[str, Any]:
        """The recording of the answer -> codes -> waveform."""
        recording = ContentPart(audio=paths["answers"][-1])
        codes = self.model.codes([recording])[recording]
        voice, _ = self.model.system.voice()
        decoder = self.model.system.speech_decoder
        wave = decoder.decode(codes, voice)
        self._save("codec", item, wave, decoder.config.sample_rate)
        return self._judged(wave, decoder.config.sample_rate, item.answers[-1])

    def _stream(self, item: Item, paths: Paths) -> dict[str, Any]:
        """The reply to a question as a whole and streamed; times are from the end of the question."""
        turns = [Turn("user", audio=paths["questions"][0])]
        system = self.model.system
        whole = system.reply(turns, **SAMPLING)
        start = time.perf_counter()
        first_sound = None
        waves = []
        stream = system.stream(turns, **SAMPLING)
        for piece in stream:
            if piece.wave.size and first_sound is None:
                first_sound = time.perf_counter() - start
            waves.append(piece.wave)
        elapsed = time.perf_counter() - start
        assert stream.reply is not None  # the stream has ended
        codes = stream.reply.codes
        common = min(len(codes), len(whole.codes))
        different = int((codes[:common] != whole.codes[:common]).sum()) + abs(len(codes) - len(whole.codes))
        return self._judge_reply(item, 0, stream.reply, "ss") | {
            "whole": self._judge_reply(item, 0, whole, "ss")["right"],
            "differ": different,
            "codes": len(codes),
            "first": first_sound,
            "spent": elapsed,
            "seconds": np.concatenate(waves).size / stream.sample_rate,
        }

    def _vocoder(self, item: Item, paths: Paths) -> dict[str, Any]:
        """The mel of a recording -> waveform, compared with the recording."""
        import jax.numpy as jnp

        from moss_jax.audio.features import mel_24k
        from moss_jax.speech_decoder.decoder import vocode

        wave, rate = load_audio(paths["answers"][-1])
        decoder = self.model.system.speech_decoder
        padded = np.pad(wave, (0, -len(wave) % rate))  # to whole seconds, so that few lengths are compiled
        mel = np.asarray(mel_24k(jnp.asarray(padded[None]), jnp.array([len(wave)])))[0]
        made = vocode(decoder.vocoder_params, decoder.vocoder_config, mel[: len(wave) // decoder.vocoder_config.hop], 0)
        self._save("vocoder", item, made, rate)
        return quality(wave[: len(made)], made[: len(wave)], rate)

    def _replies(
        self, model: EvaluatedModel, part: str, group: str, way: str, pairs: ItemRecordings | None = None
    ) -> None:
        """Asks the items of a set, or `pairs` of them, in one way; batch by batch, with all turns."""
        pairs = self._item_recordings(group) if pairs is None else pairs
        missing = [(item, paths) for item, paths in pairs if f"{part}/{item.name}" not in self.results.done]
        done = len(pairs) - len(missing)
        for first in range(0, len(missing), model.batch_size):
            batch = missing[first : first + model.batch_size]
            records = []
            for (item, _), replies in zip(batch, self._ask(model, batch, way), strict=True):
                record = {"id": f"{part}/{item.name}", "part": part, "group": group, "kind": item.kind}
                judged = [self._judge_reply(item, turn, reply, way) for turn, reply in enumerate(replies)]
                last = replies[-1]
                if way[1] == "s" and last.wave is not None and last.wave.size:
                    self._save(part, item, last.wave, last.sample_rate)
                all_turns = len(replies) == len(item.questions)
                fields = {
                    "right": all_turns and judged[-1]["right"],
                    "first": judged[0]["right"],
                    "complete": last.complete,
                    "codes": len(last.codes),
                }
                records.append(record | judged[-1] | fields)
            self.results.append(records)
            done += len(batch)
            self.say(f"{part}, {SETS[group]}: {done} of {len(pairs)}")

    def _ask(self, model: EvaluatedModel, batch: Sequence[tuple[Item, Paths]], way: str) -> list[list[Reply]]:
        """The replies to each turn of some items; a dialogue ends after an empty reply."""
        turns: list[list[Turn]] = [[] for _ in batch]
        replies: list[list[Reply]] = [[] for _ in batch]
        for number in range(max(len(item.questions) for item, _ in batch)):
            active = [
                i
                for i, (item, _) in enumerate(batch)
                if number < len(item.questions) and len(replies[i]) == number and _can_continue(replies[i], way)
            ]
            for i in active:
                item, paths = batch[i]
                if replies[i]:
                    last = replies[i][-1]
                    spoken = way[1] == "s"
                    turns[i].append(
                        Turn("assistant", codes=last.codes) if spoken else Turn("assistant", text=last.text)
                    )
                if way[0] == "s":
                    turns[i].append(Turn("user", audio=paths["questions"][number]))
                else:
                    turns[i].append(Turn("user", text=item.questions[number]))
            if active:
                answers = model.system.reply_batch(
                    [turns[i] for i in active],
                    reply="speech" if way[1] == "s" else "text",
                    batch_size=model.batch_size,
                    **SAMPLING,
                )
                for i, answer in zip(active, answers, strict=True):
                    replies[i].append(answer)
        return replies

    def _judge_reply(self, item: Item, turn: int, reply: Reply, way: str) -> dict[str, Any]:
        answer = item.answers[turn]
        if way[1] == "t":
            return {"said": reply.text, "right": normalized_words(reply.text) == normalized_words(answer)}
        if reply.wave is None or not reply.wave.size:
            return {"said": "", "refused": "no speech", "right": False}
        return self._judged(reply.wave, reply.sample_rate, answer)

    def _judged(self, wave: np.ndarray, rate: int, answer: str) -> dict[str, Any]:
        result = self.judge.recognize(wave, rate)
        return {"said": result.text, "refused": result.refused, "right": result.says(answer)}

    def _save(self, part: str, item: Item, wave: np.ndarray, rate: int) -> None:
        folder = self.folder / "waves" / part
        folder.mkdir(parents=True, exist_ok=True)
        save_audio(folder / f"{item.name}.wav", wave, rate)


def _spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` items, evenly spaced."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _can_continue(replies: Sequence[Reply], way: str) -> bool:
    """Whether the latest reply is not empty, so that the dialogue can have a next turn."""
    if not replies:
        return True
    return len(replies[-1].codes) > 0 if way[1] == "s" else bool(replies[-1].text.strip())


def quality(reference: np.ndarray, made: np.ndarray, rate: int) -> dict[str, Any]:
    """Wide-band PESQ (ITU-T P.862.2) and STOI of a wave against its reference, at 16 kHz."""
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
    """Writes a copy of a system with the values of every parameter in random order, as a control."""
    from safetensors.numpy import save_file

    generator = np.random.default_rng(seed)
    with atomic_folder(out) as part:
        for path in sorted(Path(folder).rglob("*")):
            target = part / path.relative_to(folder)
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            elif path.suffix == ".safetensors" and "voices" not in path.parts:
                reader = open_tensors(path)
                shuffled = {
                    name: generator.permutation(reader.read(name).reshape(-1)).reshape(info.shape)
                    for name, info in reader.tensors.items()
                }
                save_file(shuffled, target, reader.metadata or None)
            elif path.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())


def _tables(records: Sequence[Record], evaluation: _Evaluation) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows and the notes of the report."""
    names = {group: {item.name for item in items} for group, items in evaluation.items.items()}
    by_part: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        name = record["id"].partition("/")[2]
        if name in names.get(record["group"], ()):
            by_part.setdefault((record["part"], record["group"]), {})[name] = record
    rows = list(_rows(by_part, evaluation))
    notes = [f"Judge: {evaluation.judge.name}. An answer is right word for word; intervals are Wilson's, 95%."]
    if budget := _budget(by_part):
        notes.append("Where answers are lost (unseen voices):\n\n" + markdown_table(budget))
    if ("vocoder", SENTENCES) in by_part:
        notes.append("Vocoder, true mel to sound, unseen sentences:\n\n" + markdown_table(_vocoder_rows(by_part)))
    if ("stream", RESYNTHESIS) in by_part:
        notes.append(_stream_note(list(by_part["stream", RESYNTHESIS].values())))
    if ("ss", RESYNTHESIS) in by_part:
        notes.append("Spoken to spoken by kind (unseen voices):\n\n" + markdown_table(list(_kind_rows(by_part))))
        replies = by_part["ss", RESYNTHESIS].values()
        cut = sum(not record["complete"] for record in replies)
        refused = sum(bool(record["refused"]) for record in replies)
        notes.append(f"Of these, cut off: {cut}; refused by the judge's checks: {refused}.")
    return rows, notes


def _rows(by_part: Records, evaluation: _Evaluation) -> Iterator[dict[str, Any]]:
    def row(title: str, part: str, group: str) -> Iterator[dict[str, Any]]:
        if (part, group) in by_part:
            yield accuracy_row(title, [record["right"] for record in by_part[part, group].values()])

    for group in evaluation.items:
        yield from row(f"judge's ceiling, {SETS[group]}", "ceiling", group)
        yield from row(f"codec: codes -> speech, {SETS[group]}", "codec", group)
        for way in evaluation.ways:
            yield from row(f"{way[0].upper()}->{way[1].upper()}, {SETS[group]}", way, group)
    for name, (title, _) in CONDITIONS.items():
        yield from row(f"S->T, {SETS[RESYNTHESIS]}, {title}", name, RESYNTHESIS)
    yield from row("control: S->S, weights in random order", "untrained", RESYNTHESIS)
    for part, title in (("ceiling", "the answering voice"), ("ss", "S->S")):
        if (part, RESYNTHESIS) in by_part:
            records = by_part[part, RESYNTHESIS]
            items = {item.name: item for item in evaluation.items[RESYNTHESIS]}
            shuffled = _right_for_others(records, items, shuffled_items(items))
            yield accuracy_row(f"control: {title}, answers shuffled", shuffled)
            if part == "ss":
                same_kind = _right_for_others(records, items, next_of_kind(items))
                yield accuracy_row("control: S->S, another question of the kind", same_kind)


def _right_for_others(
    records: Mapping[str, Record], items: Mapping[str, Item], others: Mapping[str, str]
) -> list[bool]:
    """Whether the words recognised for each item are the answer to another item."""
    return [
        not record.get("refused")
        and normalized_words(record["said"]) == normalized_words(items[others[name]].answers[-1])
        for name, record in records.items()
    ]


def shuffled_items(items: Mapping[str, Item]) -> dict[str, str]:
    """Another item for each item, in random order."""
    names = list(items)
    order = random.Random(0).sample(names, len(names))
    return {name: order[(order.index(name) + 1) % len(order)] for name in names}


def next_of_kind(items: Mapping[str, Item]) -> dict[str, str]:
    """The next item of the same kind with another answer; of any kind, if all of the kind have the same answer."""
    names = list(items)
    chosen = {}
    for i, name in enumerate(names):
        item = items[name]
        others = [other for other in names[i + 1 :] + names[:i] if items[other].answers[-1] != item.answers[-1]]
        same_kind = next((other for other in others if items[other].kind == item.kind), None)
        chosen[name] = same_kind or (others[0] if others else name)
    return chosen


def _budget(by_part: Records) -> list[dict[str, Any]]:
    """Factors of the spoken-to-spoken accuracy: what the text model knows, what is lost in hearing and in speaking."""
    shares = {}
    for part in ("tt", "st", "ss", "ceiling", "codec"):
        if (part, RESYNTHESIS) not in by_part:
            return []
        shares[part] = float(np.mean([record["right"] for record in by_part[part, RESYNTHESIS].values()]))

    def percent(numerator: float, denominator: float) -> float | str:
        return round(100 * numerator / denominator, 1) if denominator else "-"

    rows = [
        ("knowing: T->T", percent(shares["tt"], 1)),
        ("hearing (speech tokenizer, LM): S->T over T->T", percent(shares["st"], shares["tt"])),
        (
            "saying the codes (LM): S->S over S->T, codec and judge",
            percent(shares["ss"], shares["st"] * shares["codec"]),
        ),
        ("codec: resynthesis over the ceiling", percent(shares["codec"], shares["ceiling"])),
        ("judge: the ceiling", percent(shares["ceiling"], 1)),
        ("all together: S->S", percent(shares["ss"], 1)),
    ]
    return [{"part": part, "kept %": kept} for part, kept in rows]


def _stream_note(records: Sequence[Record]) -> str:
    codes = sum(record["codes"] for record in records)
    different = sum(record["differ"] for record in records)
    accuracy = markdown_table(
        [
            accuracy_row("S->S in one piece", [record["whole"] for record in records]),
            accuracy_row("S->S streamed", [record["right"] for record in records]),
        ]
    )
    note = f"Streamed beside one piece, question by question: {different} of {codes} codes differ.\n\n{accuracy}"
    spoken = [record for record in records if record["first"] is not None]
    if not spoken:
        return note
    first_ms = 1000 * np.array([record["first"] for record in spoken])
    factors = np.array([record["spent"] / record["seconds"] for record in spoken])
    rows = []
    for what, values, digits in (
        ("first sound after the question, ms", first_ms, 0),
        ("real-time factor", factors, 2),
    ):
        median = f"{np.median(values):.{digits}f}"
        rows.append({"what": what, "median": median, "95th percentile": f"{np.percentile(values, 95):.{digits}f}"})
    return f"{note}\n\n{markdown_table(rows)}"


def _vocoder_rows(by_part: Records) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for key, title in (("pesq", "PESQ-wb"), ("stoi", "STOI")):
        values = np.array([record[key] for record in by_part["vocoder", SENTENCES].values()])
        mean = values.mean()
        half = 1.96 * values.std() / len(values) ** 0.5
        numbers = {"mean": mean, "95% from": mean - half, "95% to": mean + half}
        rounded = {name: round(float(value), 3) for name, value in numbers.items()}
        rows.append({"what": title, "items": len(values), **rounded})
    return rows


def _kind_rows(by_part: Records) -> Iterator[dict[str, Any]]:
    kinds: dict[str, list[bool]] = {}
    for record in by_part["ss", RESYNTHESIS].values():
        kinds.setdefault(record["kind"], []).append(record["right"])
    for kind, right in kinds.items():
        yield accuracy_row(kind, right)

"""Examples on disk: ArrayRecord shards behind a TensorFlow Datasets builder (without TensorFlow), and their lengths.

FOLDER/source.json                                  format, counts, vocabulary, text tokenizer
       lengths.npy                                  int32 [examples], grid rows of each
       examples-train.array_record-00000-of-00004   the examples, in order
       dataset_info.json, features.json             for `tfds.builder_from_directory(FOLDER).as_data_source("train")`
"""

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moss_jax.checkpoint.config_io import read_config
from moss_jax.data.formats import Example
from moss_jax.documents import read_json, shown
from moss_jax.errors import MossError
from moss_jax.files import atomic_folder, write_text
from moss_jax.speech_lm import SpeechLMConfig

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

EXAMPLES_FORMAT = "moss-jax-examples-1"
SOURCE_FILE = "source.json"
LENGTHS_FILE = "lengths.npy"
# Names of the TensorFlow Datasets builder.
DATASET_NAME = "examples"
SPLIT = "train"
DATASET_VERSION = "1.0.0"
VOCABULARY_FIELDS = (
    "text_vocab_size",
    "audio_vocab_size",
    "endoftext_id",
    "im_start_id",
    "im_end_id",
    "sosp_id",
    "modality_pad_id",
    "eosp_id",
    "audio_pad_id",
)
EXAMPLES_PER_SHARD = 16384


def vocabulary(config: SpeechLMConfig) -> dict[str, int]:
    """The fields of a model's config that examples depend on."""
    return {name: getattr(config, name) for name in VOCABULARY_FIELDS}


@dataclass(frozen=True)
class Shard:
    """The description of a finished shard.

    Attributes:
        lengths: grid rows of each example.
        size: bytes of the file.
        scored: sums of the loss weights in the text and the audio channel.
    """

    lengths: list[int]
    size: int
    scored: tuple[float, float]


def write_shard(path: Path, examples: Iterable[Example]) -> Shard:
    """Writes one ArrayRecord file through the builder, whole or not at all.

    Raises:
        MossError: an example is malformed, or the file cannot be written.
    """
    lengths: list[int] = []
    scored = np.zeros(2)
    failures: list[Exception] = []

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal scored
        try:
            for example in examples:
                example.check()
                lengths.append(len(example.grid))
                scored = scored + example.loss_weights.sum(0, dtype=np.float64)
                yield {"name": example.name, "grid": example.grid, "loss_weights": example.loss_weights}
        except Exception as error:  # the builder raises another one instead
            failures.append(error)
            raise

    with _write_errors(path):
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        with _write_errors(path):
            part = _build(folder, counted())
            with part.open("rb") as file:
                os.fsync(file.fileno())
            size = part.stat().st_size
            os.replace(part, path)
    except Exception as error:
        if failures:
            raise failures[0] from None
        if isinstance(error, RuntimeError):  # which ArrayRecord raises when the disk is full
            raise MossError(f"{path}: cannot be written ({_reason(error)}); free some disk space") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Shard(lengths, size, (float(scored[0]), float(scored[1])))


def seal(folder: Path, paths: Sequence[Path], shards: Sequence[Shard], source: dict[str, Any]) -> None:
    """Makes a folder of shards a data set: renames them in order and writes the lengths and the descriptions.

    May be called again when it was interrupted; a path that does not exist has been renamed already.

    Args:
        paths, shards: the file and the description of each shard, in order.
        source: fields of source.json besides the counts.
    """
    import tensorflow_datasets as tfds

    lengths = np.concatenate([np.asarray(shard.lengths, np.int32) for shard in shards])
    with _write_errors(folder):
        for index, path in enumerate(paths):
            if path.exists():
                os.replace(path, folder / shard_name(index, len(paths)))
        with (folder / LENGTHS_FILE).open("wb") as file:
            np.save(file, lengths)
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=DATASET_NAME, split=SPLIT, filetype_suffix="array_record"
        )
        split = tfds.core.SplitInfo(
            name=SPLIT,
            shard_lengths=[len(shard.lengths) for shard in shards],
            num_bytes=sum(shard.size for shard in shards),
            filename_template=template,
        )
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=DATASET_NAME,
            version=tfds.core.Version(DATASET_VERSION),
            data_dir=os.fspath(folder),
            module_name=__name__,
        )
        info = tfds.core.DatasetInfo(builder=identity, features=_features(), disable_shuffling=True)
        info.set_file_format("array_record")
        info.set_splits(tfds.core.splits.SplitDict([split]))
        info.write_to_directory(folder)
        text, audio = np.sum([shard.scored for shard in shards], 0).tolist()
        content = {
            "format": EXAMPLES_FORMAT,
            "examples": len(lengths),
            "rows": int(lengths.sum(dtype=np.int64)),
            "text_targets": text,
            "audio_targets": audio,
            **source,
        }
        write_text(folder / SOURCE_FILE, json.dumps(content, indent=1) + "\n")


def shard_name(index: int, count: int) -> str:
    return f"{DATASET_NAME}-{SPLIT}.array_record-{index:05d}-of-{count:05d}"


def write_examples(
    folder: str | Path,
    examples: Iterable[Example],
    config: SpeechLMConfig,
    *,
    kind: str = "examples",
    examples_per_shard: int = EXAMPLES_PER_SHARD,
) -> None:
    """Writes a data set of examples in their order, whole or not at all.

    Args:
        folder: must not exist, or be empty.
        config: of the model whose ids the examples have.
        kind: the format of the examples, for source.json.
        examples_per_shard: examples per file.

    Raises:
        MossError: there is no example, one is malformed or has ids outside the vocabulary, or the folder cannot be
            written.
    """
    with atomic_folder(folder) as part:
        paths: list[Path] = []
        shards: list[Shard] = []
        iterator = iter(examples)
        while chunk := list(islice(iterator, examples_per_shard)):
            for example in chunk:
                _check_ids(example, config)
            paths.append(part / f"shard-{len(paths):05d}")
            shards.append(write_shard(paths[-1], chunk))
        if not shards:
            raise MossError(f"{folder}: no example to write, expected at least one")
        seal(part, paths, shards, {"kind": kind, "text_tokenizer": None, "vocabulary": vocabulary(config)})


def _check_ids(example: Example, config: SpeechLMConfig) -> None:
    example.check()
    sizes = (config.text_vocab_size, config.audio_vocab_size)
    if (example.grid < 0).any() or (example.grid >= sizes).any():
        raise MossError(f"example {example.name!r}: its ids do not fit the vocabularies of {sizes[0]} and {sizes[1]}")


@dataclass(frozen=True)
class _Source:
    """The fields of source.json that a reader uses."""

    examples: int
    vocabulary: dict | None = None
    text_tokenizer: str | None = None


class Examples:
    """A data set on disk as a sequence: `examples[i]` is an Example. May be pickled.

    Attributes:
        lengths: int32 [examples], grid rows of each.
        about: the content of source.json.

    Raises:
        MossError: there is no data set, parts of it are missing, or it does not match `config`.
    """

    lengths: np.ndarray

    def __init__(self, folder: str | Path, config: SpeechLMConfig | None = None):
        self.folder = Path(folder)
        if not (self.folder / SOURCE_FILE).is_file():
            raise MossError(f"{folder}: no {SOURCE_FILE} in it, expected a data set (moss-jax tokenize makes one)")
        self.about = read_json(self.folder / SOURCE_FILE)
        if self.about.get("format") != EXAMPLES_FORMAT:
            stored = self.about.get("format")
            raise MossError(f"{self.folder / SOURCE_FILE}: format is {shown(stored)}, expected {EXAMPLES_FORMAT!r}")
        read_config(_Source, self.about, self.folder / SOURCE_FILE, foreign=True)
        if config is not None:
            self._check_vocabulary(config)
        self._open()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self._source[int(index)]
        except IndexError:
            raise
        except Exception as error:  # two libraries raise many types for damaged files
            raise MossError(f"{self.folder}: example {index} cannot be read ({_first_line(error)})") from error
        return Example(record["grid"], record["loss_weights"], record["name"].decode())

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "about": self.about}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds

        try:
            self.lengths = np.load(self.folder / LENGTHS_FILE, mmap_mode="r")
            builder = tfds.builder_from_directory(self.folder)
            self._source = builder.as_data_source(SPLIT)
        except Exception as error:  # several libraries raise many types for files that are missing or damaged
            raise MossError(f"{self.folder}: the data set cannot be opened ({_first_line(error)})") from error
        if not len(self.lengths) == len(self._source) == self.about["examples"]:
            raise MossError(
                f"{self.folder}: damaged, has {len(self._source)} examples and {len(self.lengths)} lengths, its "
                f"{SOURCE_FILE} says {self.about['examples']}"
            )
        missing = [path for path in builder.info.splits[SPLIT].filepaths if not Path(path).is_file()]
        if missing:
            raise MossError("\n  ".join([f"{self.folder}: {len(missing)} shard files are missing", *map(str, missing)]))

    def _check_vocabulary(self, config: SpeechLMConfig) -> None:
        stored = self.about.get("vocabulary") or {}
        differences = [
            f"{name} is {stored.get(name)}, the model's is {value}"
            for name, value in vocabulary(config).items()
            if stored.get(name) != value
        ]
        if differences:
            summary = (
                f"{self.folder}: made for another vocabulary ({differences[0]}), expected one made with this model"
            )
            raise MossError("\n  ".join([summary, *differences]))


def _features() -> "tfds.features.FeaturesDict":
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "name": tfds.features.Text(),
            "grid": tfds.features.Tensor(shape=(None, 2), dtype=np.int32, encoding="bytes"),
            "loss_weights": tfds.features.Tensor(shape=(None, 2), dtype=np.float32, encoding="bytes"),
        }
    )


@cache
def _builder_class() -> Any:
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder):
        """The examples of one shard, in the order given."""

        name = DATASET_NAME
        VERSION = tfds.core.Version(DATASET_VERSION)
        code_path = None  # there are no download checksums next to this file

        def __init__(self, examples: Iterable[dict[str, Any]], folder: Path):
            self.examples = examples
            super().__init__(data_dir=folder, file_format="array_record")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=_features(), disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {SPLIT: self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(self.examples)

    return Builder


def _build(folder: Path, examples: Iterable[dict[str, Any]]) -> Path:
    """Runs the builder over examples; the path of the one shard it writes."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder = _builder_class()(examples, folder)
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=1))
    del builder.examples  # the library keeps a reference to every builder
    return Path(builder.data_dir) / shard_name(0, 1)


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Errors of the file system in the block become one about `path`."""
    try:
        yield
    except OSError as error:
        raise MossError(
            f"{path}: cannot be written ({error.strerror or error}); choose a place that exists and is writable"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _reason(error: RuntimeError) -> str:
    """The error of the operating system in ArrayRecord's long message."""
    line = _first_line(error)
    match = re.search(r"write\(\) failed: ([^;]+)", line)
    return match[1] if match else line

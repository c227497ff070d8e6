"""`moss-jax compile`: compiles a function of a model ahead of time for TPU chips that are not there.

The compiler comes with libtpu and runs on any machine. It takes some environment variables that must not leak into the
caller, so `compile_function` runs this module in a process of its own; `measure` is what runs in there.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jax.errors import MossError

FUNCTIONS = {
    "prefill": "a prompt of `context` rows into empty caches",
    "decode": "the k-step decode chunk of the generation loop, caches of `context` rows",
    "codec-encode": "speech -> codes, segments of 30 s",
    "codec-decode": "codes -> speech, offline, `context` codes with the prompt; noise is an input",
    "stage1": "a training step of the audio branch, everything else frozen; `batch` rows of `context`",
    "stage2": "a training step of the whole model",
    "sft": "the same step; for another context",
    "lora": "the same with adapters of rank 16 beside every kernel of the layers, the rest frozen",
}
TRAINING = ("stage1", "stage2", "sft", "lora")
TRAINING_FIELDS = ("sequence", "accumulate", "remat", "mfu")  # of a request: what only a training step has
SIZES = ("8b", "tiny")
REMAT = ("none", "dots", "full")
CHIP_GIB = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}  # memory that a program may use
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any known one; the topology comes by name
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so another process may compile beside
}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
GIB = 2**30


@dataclass(frozen=True)
class CompileRequest:
    """What to compile. The mesh axis left at 0 fills up: "tensor" for the language model, "data" for the codec,
    "sequence" for training."""

    function: str  # one of FUNCTIONS
    size: str = "8b"  # one of SIZES
    topology: str = "v5e:2x4"  # generation:chips, as libtpu names them
    data: int = 1
    fsdp: int = 1
    tensor: int = 0
    sequence: int = 0  # training only
    batch: int = 8
    context: int = 4096
    accumulate: int = 1  # training: micro-batches of a step
    remat: str = "full"  # training: one of transformer.config.REMAT
    mfu: float = 0.4  # training: the share of the peak at which the step's time is stated

    def check(self) -> None:
        """Raises MossError for names that are not known and sizes below 1."""
        for name, value, known in (("function", self.function, FUNCTIONS), ("model size", self.size, SIZES)):
            if value not in known:
                raise MossError(f"unknown {name} {value!r}, expected one of {', '.join(known)}")
        for name in ("data", "fsdp", "batch", "context", "accumulate"):
            if getattr(self, name) < 1:
                raise MossError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.remat not in REMAT:
            raise MossError(f"remat is {self.remat!r}, expected one of {', '.join(REMAT)}")
        if not 0 < self.mfu <= 1:
            raise MossError(f"mfu is {self.mfu}, expected above 0 and at most 1")
        if not re.fullmatch(r"v\d+\w*:\d+(x\d+)*", self.topology):
            raise MossError(f"unknown topology {self.topology!r}, expected one such as v5e:2x4, v6e:4x4 or v5p:2x2x1")
        if importlib.util.find_spec("libtpu") is None:
            raise MossError(
                "libtpu is not installed, expected it for compiling without a TPU: pip install 'moss-jax[tpu]'"
            )


def compile_function(
    request: CompileRequest, say: Callable[[str], None] = lambda line: None, every: float = 30.0
) -> dict[str, Any]:
    """Compiles in a child process and returns what `measure` returns there.

    Args:
        say: gets a line of progress every `every` seconds.

    Raises:
        MossError: unknown function, size or topology, a mesh that does not fit, or no libtpu.
    """
    request.check()
    with tempfile.TemporaryDirectory() as dump:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} --xla_dump_hlo_as_text"
        command = [sys.executable, "-m", "moss_jax.compile.serving", json.dumps(dataclasses.asdict(request)), dump]
        environment = os.environ | ENVIRONMENT | {"XLA_FLAGS": flags}
        with _progress(f"compiling {request.function} for {request.topology}", say, every):
            child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode == 2:
        raise MossError(child.stdout.strip())
    if child.returncode:
        raise RuntimeError(f"compiling failed with exit code {child.returncode}:\n{child.stderr[-4000:]}")
    return json.loads(child.stdout.splitlines()[-1])


@contextlib.contextmanager
def _progress(what: str, say: Callable[[str], None], every: float) -> Iterator[None]:
    """Says every `every` seconds for how long the block has been running."""
    begun = time.monotonic()
    done = threading.Event()

    def report() -> None:
        while not done.wait(every):
            say(f"{what}: {time.monotonic() - begun:.0f} s so far")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def measure(request: CompileRequest, dump: Path) -> dict[str, Any]:
    """Compiles in this process; GiB and collectives are those of one chip, sizes as the compiler states them.

    `dump` is the folder of the flag `xla_dump_to`: there lies the text of a program that jax itself cannot print.
    """
    import jax

    mesh, family = _mesh(request)
    with jax.set_mesh(mesh):
        function, args = BUILDERS[request.function](request, mesh)
        start = time.perf_counter()
        lowered = function.lower(*args)
        lower_seconds = time.perf_counter() - start
        asked = dataclasses.asdict(request)
        result = {
            **{name: asked[name] for name in asked if request.function in TRAINING or name not in TRAINING_FIELDS},
            "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
            "chips": mesh.size,
            "versions": {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")},
            **_estimate(request, mesh.size, family),
            "lower_seconds": round(lower_seconds, 1),
        }
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return result | {"fits": False, "compiler": str(error).splitlines()[0]}
    result["compile_seconds"] = round(time.perf_counter() - start - lower_seconds, 1)
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return result | {
        "argument_gib": round(memory.argument_size_in_bytes / GIB, 3),
        "temporary_gib": round(memory.temp_size_in_bytes / GIB, 3),
        "output_gib": round(memory.output_size_in_bytes / GIB, 3),
        "output_in_place_gib": round(memory.alias_size_in_bytes / GIB, 3),
        "total_gib": round(peak / GIB, 3),
        "chip_gib": CHIP_GIB.get(family),
        "fits": peak / GIB <= CHIP_GIB[family] if family in CHIP_GIB else None,
        "collectives": collectives(_text(compiled, dump)),
    }


def _text(compiled, dump: Path) -> str:
    import jax

    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:  # for v5p libtpu makes asynchronous instructions that jax refuses to read
        return max(dump.glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size).read_text()


def _estimate(request: CompileRequest, chips: int, family: str) -> dict[str, Any]:
    if request.function not in TRAINING:
        return {}
    from moss_jax.compile.training import estimate

    return estimate(request, chips, family)


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} of a compiled module's text: runs, and bytes of the results on one chip.

    A loop over a fixed number of rounds (the layers) counts that often; any other loop (rows of a reply, chunks that
    catch up) counts as one round, and every branch of a conditional as taken once. A collective that runs beside other
    work stands in several fusions, as its start, its middle and its end: one chain counts once.
    """
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header:
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = []
        elif name and line.startswith(" "):
            computations[name].append(line)
    total: dict[str, dict[str, int]] = {}

    def visit(computation: str, times: int, chains: set[str]):
        for line in computations.get(computation, ()):
            operation = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
            chain = re.search(r'chain_id="(\d+)"', line)
            if operation and not (chain and chain[1] in chains):
                chains.update(chain.groups() if chain else ())
                entry = total.setdefault(operation[2], {"count": 0, "bytes": 0})
                entry["count"] += times
                entry["bytes"] += times * _bytes(operation[1], operation[2], bool(operation[3]))
            for callee, rounds, loop in _calls(line, computations):
                visit(callee, times * rounds, set() if loop else chains)

    visit(entry, 1, set())
    return total


def _calls(line: str, computations: dict[str, list[str]]) -> list[tuple[str, int, bool]]:
    """The computations that an instruction runs, each with the number of times and whether it is a loop's body."""
    if re.search(r" async-(update|done)\(", line):  # the start has run it
        return []
    called = [(callee, 1, False) for callee in re.findall(r"(?:calls|to_apply|_computation)=%?([\w.\-]+)", line)]
    for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
        called += [(callee.strip().lstrip("%"), 1, False) for callee in group.split(",")]
    loop = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    if loop:
        condition = computations.get(loop[1], [])
        body = computations.get(loop[2], [])
        called.append((loop[2], _rounds(line, condition, body), True))
    return called


def _rounds(line: str, condition: list[str], body: list[str]) -> int:
    """Rounds of a loop: as the compiler notes them, or N / step where the condition is `counter < N` and nothing else
    and the body adds a constant step to the counter."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    simple = "parameter", "get-tuple-element", "constant", "compare"
    others = [text for text in condition if not re.search(rf" ({'|'.join(simple)})\(", text)]
    limits = [found[1] for text in condition if (found := re.search(r" constant\((\d+)\)", text))]
    counts_up = any("direction=LT" in text for text in condition)
    if not counts_up or len(limits) != 1 or others:
        return 1
    return -(-int(limits[0]) // _counter_step(condition, body))


def _counter_step(condition: list[str], body: list[str]) -> int:
    """What a round adds to the loop's counter; 1 where the body does not show it.

    The rings in which XLA passes weights from chip to chip are loops whose rounds are unrolled by two.
    """
    index = _first(r"get-tuple-element\(.*index=(\d+)", condition)
    result = _first(r"ROOT .* tuple\((.*?)\)(?:,|$)", body)
    if index is None or result is None:
        return 1
    counter = dict(enumerate(re.findall(r"%([\w.\-]+)", result))).get(int(index), "")
    for operand in re.findall(r"%([\w.\-]+)", _first(rf"%{re.escape(counter)} = .* add\(([^)]*)\)", body) or ""):
        step = _first(rf"%{re.escape(operand)} = .* constant\((\d+)\)", body)
        if step is not None:
            return int(step)
    return 1


def _first(pattern: str, lines: list[str]) -> str | None:
    """The group of a pattern in the first line that it matches."""
    return next((found[1] for line in lines if (found := re.search(pattern, line))), None)


def _bytes(shapes: str, kind: str, start: bool) -> int:
    """Bytes of a result. An asynchronous start lists operand and result, but an all-reduce its results only."""
    sizes = []
    for dtype, dims in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", shapes):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        sizes.append(count * bits // 8)
    return max(sizes) if start and kind != "all-reduce" else sum(sizes)


def _mesh(request: CompileRequest):
    import jax
    from jax.experimental import topologies

    from moss_jax.sharding import make_mesh

    try:
        devices = topologies.get_topology_desc(topology_name=request.topology, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise MossError(
            f"unknown topology {request.topology!r} ({reason}), expected one such as v5e:2x4, v6e:4x4 or v5p:2x2x1"
        ) from error
    sizes = {"data": request.data, "fsdp": request.fsdp, "tensor": request.tensor}
    if request.function.startswith("codec"):
        sizes = {"data": len(devices)}
    elif request.function in TRAINING:
        sizes["tensor"] = max(1, request.tensor)
        sizes["sequence"] = request.sequence or max(1, len(devices) // (request.data * request.fsdp * sizes["tensor"]))
    elif not request.tensor:
        sizes["tensor"] = max(1, len(devices) // (request.data * request.fsdp))
    return make_mesh(**sizes, devices=devices), re.split(r"[:=_]", request.topology)[0]


def _transformer(request: CompileRequest):
    from moss_jax.speech_lm import MOSS_SPEECH_8B, TINY

    return {"8b": MOSS_SPEECH_8B, "tiny": TINY}[request.size]


def _placed(tree: Any, axes: Callable[[tuple, Any], tuple], mesh) -> Any:
    """The shapes of `tree` with shardings; `axes(path, leaf)` names the logical axes of a leaf."""
    import jax

    from moss_jax.sharding import fitting

    def place(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=fitting(axes(path, leaf), leaf.shape, mesh))

    return jax.tree.map_with_path(place, tree)


def _generation(request: CompileRequest, mesh):
    """Shapes with shardings of (parameters, GenerationState), and the config."""
    import jax

    from moss_jax.generate.loop import new_state
    from moss_jax.nn.tree import unflatten
    from moss_jax.sharding import shardings_for
    from moss_jax.speech_lm import model_axes, model_shapes
    from moss_jax.speech_lm.cache import CACHE_AXES

    config = _transformer(request)
    shapes = model_shapes(config)
    shardings = shardings_for(model_axes(config), shapes, mesh)
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path]) for path, leaf in shapes.items()
    }
    state = jax.eval_shape(lambda: new_state(config, request.batch, request.context))

    def axes(path, leaf):
        if leaf.ndim == len(CACHE_AXES):
            return CACHE_AXES
        return ("batch",) * (leaf.ndim > 0) + (None,) * (leaf.ndim - 1)

    return config, unflatten(params), _placed(state, axes, mesh)


def _prefill(request: CompileRequest, mesh):
    import jax
    import jax.numpy as jnp

    from moss_jax.generate.loop import prefill

    config, params, state = _generation(request, mesh)
    shapes = (request.batch, request.context, 2), (request.batch, request.context)
    inputs = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, (jnp.int32, jnp.bool_), strict=True)]
    inputs = _placed(inputs, lambda _, leaf: ("batch",) + (None,) * (leaf.ndim - 1), mesh)

    def run(params, state, rows, valid, count):
        return prefill(params, state, rows, valid, count, state.keys, config=config)

    function = jax.jit(run, donate_argnums=1, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state))
    return function, (params, state, *inputs, jax.ShapeDtypeStruct((), jnp.int32))


def _decode(request: CompileRequest, mesh):
    import jax
    import jax.numpy as jnp

    from moss_jax.generate.loop import GenerationSettings, decode_chunk

    config, params, state = _generation(request, mesh)

    def run(params, state, k):
        return decode_chunk(params, state, GenerationSettings(), k, config=config)

    function = jax.jit(run, donate_argnums=1, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state))
    return function, (params, state, jax.ShapeDtypeStruct((), jnp.int32))


def _codec_encode(request: CompileRequest, mesh):
    import jax
    import jax.numpy as jnp

    from moss_jax.speech_tokenizer import config as configs
    from moss_jax.speech_tokenizer.encode import encode_padded
    from moss_jax.speech_tokenizer.encoder import init_params

    config = {"8b": configs.MOSS_SPEECH_CODEC, "tiny": configs.TINY}[request.size]
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    waves = jax.ShapeDtypeStruct((request.batch, config.samples_per_segment), jnp.float32)
    lengths = jax.ShapeDtypeStruct((request.batch,), jnp.int32)
    inputs = _placed((waves, lengths), lambda _, leaf: ("batch",) + (None,) * (leaf.ndim - 1), mesh)
    params = _placed(params, lambda _, leaf: (None,) * leaf.ndim, mesh)
    return jax.jit(lambda *args: encode_padded(config, *args)), (params, *inputs)


def _codec_decode(request: CompileRequest, mesh):
    import jax
    import jax.numpy as jnp

    from moss_jax.nn.tree import param_shapes, unflatten
    from moss_jax.speech_decoder import config as configs
    from moss_jax.speech_decoder.flow.model import FlowModel
    from moss_jax.speech_decoder.flow.sampler import flow
    from moss_jax.speech_decoder.vocoder import HiFT

    config = {"8b": configs.RELEASED, "tiny": configs.TINY}[request.size]
    size = config.flow
    batch = request.batch
    frames = request.context * config.flow.frames_per_code
    vocoder = HiFT(dataclasses.replace(config.vocoder, weight_norm=False))

    def run(flow_params, vocoder_params, noise, codes, count, prompt, embedding, sine_noise):
        with jax.default_matmul_precision("highest"):
            mel = flow(flow_params, size, noise, codes, count, prompt, embedding)[-1]
            lengths = count * size.frames_per_code
            return vocoder.apply({"params": vocoder_params}, mel, sine_noise, lengths)[0]

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    mel = array(1, 4, size.mel_bins), array(1, 4 * config.vocoder.hop, config.vocoder.harmonics)
    params = unflatten(param_shapes(FlowModel(size))), unflatten(param_shapes(vocoder, *mel))
    inputs = (
        array(batch, request.context, dtype=jnp.int32),
        array(batch, dtype=jnp.int32),
        array(batch, frames, size.mel_bins),
        array(batch, size.speaker_size),
        array(batch, frames * config.vocoder.hop, config.vocoder.harmonics),
    )
    params = _placed((*params, array(1, frames, size.mel_bins)), lambda _, leaf: (None,) * leaf.ndim, mesh)
    inputs = _placed(inputs, lambda _, leaf: ("batch",) + (None,) * (leaf.ndim - 1), mesh)
    return jax.jit(run), (*params, *inputs)


def _train_step(request: CompileRequest, mesh):
    from moss_jax.compile.training import train_step

    return train_step(request, mesh)


BUILDERS = {
    "prefill": _prefill,
    "decode": _decode,
    "codec-encode": _codec_encode,
    "codec-decode": _codec_decode,
    **dict.fromkeys(TRAINING, _train_step),
}


if __name__ == "__main__":
    try:
        print(json.dumps(measure(CompileRequest(**json.loads(sys.argv[1])), Path(sys.argv[2]))))
    except MossError as error:
        print(error)
        sys.exit(2)

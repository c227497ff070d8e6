"""Measure how similar speech and text are in each layer of the model; the plot shows where to split it.

  moss-jax similarity SPEECH.jsonl --model FOLDER -o OUT
  moss-jax similarity SPEECH.jsonl --model FOLDER --control Qwen3-8B -o OUT --heatmaps 2

A line of SPEECH.jsonl is {"audio": "a.wav", "text": "its transcript"}; at least two lines are needed. Every sentence is
passed through the model as speech and as text. The cosine similarity of the two is compared with that to the text of
other sentences (the floor). OUT gets similarity.png, similarity.json and the requested heatmaps. A control is another
system folder, or a Qwen3, which has no speech: its speech embeddings are then random, as in a conversion.
"""

import argparse
from pathlib import Path

from moss_jax.cli.system_arguments import add_system_arguments, progress, system_folder
from moss_jax.compile_cache import cache_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="SPEECH.jsonl", help="recordings with their transcripts")
    add_system_arguments(parser)
    parser.add_argument(
        "--control", action="append", default=[], metavar="FOLDER", help="a model to compare with; may be repeated"
    )
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="a new or empty folder")
    parser.add_argument(
        "--heatmaps", type=int, default=0, metavar="N", help="draw heatmaps of the first N sentences (default: 0)"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="sentences per batch (default: 4)")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that shard the parameters (default: 1)")
    parser.add_argument("--tensor", type=int, default=1, help="devices that shard each layer (default: 1)")


def run(args: argparse.Namespace) -> int:
    from moss_jax.errors import MossError
    from moss_jax.evaluate import similarity
    from moss_jax.evaluate.model import EvaluatedModel, control_folder

    if args.heatmaps < 0:
        raise MossError(f"--heatmaps is {args.heatmaps}, expected at least 0")
    if args.batch_size < 1:
        raise MossError(f"--batch-size is {args.batch_size}, expected at least 1")
    sizes = {"fsdp": args.fsdp, "tensor": args.tensor, "batch_size": args.batch_size}
    model = EvaluatedModel(system_folder(args), **sizes)
    cache = cache_folder()
    codes = model.code_count
    folders = [(_name(folder), control_folder(folder, codes, cache, progress)) for folder in args.control]
    controls = ((name, EvaluatedModel(folder, **sizes)) for name, folder in folders)  # one at a time in memory
    print(
        similarity.run(
            model, args.file, args.out, controls=controls, heatmaps=args.heatmaps, name=_name(args.model), say=progress
        ),
        end="",
    )
    return 0


def _name(folder: str) -> str:
    """The label of a model: the last part of its path, or three parts for an export, whose last part is only a step."""
    parts = Path(folder).parts
    return "/".join(parts[-3:] if parts and parts[-1].isdigit() else parts[-1:])

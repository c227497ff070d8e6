"""Where speech and text look alike inside the model, layer by layer: a plot that shows where to split it.

  moss-jax similarity SPEECH.jsonl --model FOLDER -o OUT
  moss-jax similarity SPEECH.jsonl --model FOLDER --control Qwen3-8B -o OUT --heatmaps 2

A line of SPEECH.jsonl is {"audio": "a.wav", "text": "what is said in it"}; two lines or more. OUT gets similarity.png,
similarity.json and the heatmaps asked for. Each sentence passes the model as speech and as text; cosines between the
two are compared with those to text of the others (the floor). A control is another system folder, or a plain
Qwen3, which has no speech: its codes then have new random vectors, as a conversion gives them.
"""

from pathlib import Path

from moss_jax.cli.system_arguments import add_system_arguments, progress, system_folder
from moss_jax.compile_cache import cache_folder


def add_arguments(parser):
    parser.add_argument("file", metavar="SPEECH.jsonl", help="recordings with their transcripts")
    add_system_arguments(parser)
    parser.add_argument("--control", action="append", default=[], metavar="FOLDER", help="may be given several times")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="a folder that is not there yet, or empty")
    parser.add_argument("--heatmaps", type=int, default=0, metavar="N", help="pictures of the first N sentences")
    parser.add_argument("--batch-size", type=int, default=4, help="sentences at a time, default 4")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that share the parameters, default 1")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share each layer, default 1")


def run(args) -> int:
    from moss_jax.errors import MossError
    from moss_jax.evaluate import similarity
    from moss_jax.evaluate.model import EvaluatedModel, control_folder

    if args.heatmaps < 0 or args.batch_size < 1:
        raise MossError("--heatmaps and --batch-size: expected numbers from 0 and from 1")
    sizes = {"fsdp": args.fsdp, "tensor": args.tensor, "batch_size": args.batch_size}
    model = EvaluatedModel(system_folder(args), **sizes)
    cache = cache_folder()
    codes = model.code_count
    made = [(_name(folder), control_folder(folder, codes, cache, progress)) for folder in args.control]
    controls = ((name, EvaluatedModel(folder, **sizes)) for name, folder in made)  # one at a time in memory
    print(
        similarity.run(
            model, args.file, args.out, controls=controls, heatmaps=args.heatmaps, name=_name(args.model), say=progress
        ),
        end="",
    )
    return 0


def _name(folder: str) -> str:
    """What a model is called: the end of its path, and more of it where that is only the step of an export."""
    parts = Path(folder).parts
    return "/".join(parts[-3:] if parts and parts[-1].isdigit() else parts[-1:])

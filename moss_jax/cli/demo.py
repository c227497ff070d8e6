"""Talk to a system in the browser: ask aloud or in writing, hear the answer while it is being made.

  moss-jax demo                    # nano, which comes along
  moss-jax demo --model FOLDER
  moss-jax demo --model fnlp/MOSS-Speech --codec fnlp/MOSS-Speech-Codec --port 8080
  moss-jax demo --allow-host demo.example.org --root-path /moss    # behind a proxy

Needs Gradio: pip install 'moss-jax[serve]'. The page is served to this machine alone unless --host says otherwise
(0.0.0.0: to everybody who can reach it, without a password), and only under names of this machine and those of
--allow-host. One answer is made at a time, others wait in a queue. Recordings and answers are in a temporary folder
until the conversation is cleared, its page closed, an hour has passed without use, or Ctrl-C.
"""

import signal
from pathlib import Path

from moss_jax.cli.system_arguments import add_system_arguments, say, system_folder
from moss_jax.errors import MossError


def add_arguments(parser):
    add_system_arguments(parser, nano=True)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at, default 127.0.0.1")
    parser.add_argument("--port", type=int, default=7860, help="default 7860")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further host name that people open the page under, such as a proxy's; may be repeated",
    )
    parser.add_argument(
        "--root-path", default="", metavar="PATH", help="the path below which a proxy serves the page, such as /demo"
    )


def run(args) -> int:
    if not 1 <= args.port <= 65535:
        raise MossError(f"--port is {args.port}, expected 1 to 65535")
    import moss_jax
    from moss_jax.serve.app import Demo
    from moss_jax.serve.session import warm_up

    folder = system_folder(args)
    system = moss_jax.load(folder)
    warm_up(system, say)
    demo = Demo(system, Path(args.model or folder).name)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that files go then too
    try:
        address = demo.launch(args.host, args.port, False, args.allow_host, args.root_path)
        say(f"open {address} in a browser; Ctrl-C ends it")
        demo.wait()
    finally:
        demo.close()
    return 0

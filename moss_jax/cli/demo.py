"""Serve the web demo: talk to a system in the browser; answers play while they are generated.

  moss-jax demo                    # the bundled nano model
  moss-jax demo --model FOLDER
  moss-jax demo --model fnlp/MOSS-Speech --codec fnlp/MOSS-Speech-Codec --port 8080
  moss-jax demo --allow-host demo.example.org --root-path /moss    # behind a proxy

The page is served to this machine only. --host 0.0.0.0 exposes it to the network without authentication. Requests are
accepted under the names of this machine and those given by --allow-host. One answer is generated at a time; other
questions wait in a queue. Recordings and answers are stored in a temporary folder until the conversation is cleared,
its page is closed, it was unused for an hour, or the demo ends. Needs pip install 'moss-jax[serve]'.
"""

import argparse
import signal
from pathlib import Path

from moss_jax.cli.system_arguments import add_system_arguments, say, system_folder
from moss_jax.errors import MossError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_system_arguments(parser, nano=True)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 exposes the demo to the network without authentication "
        "(default: 127.0.0.1)",
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further host name that the page is opened under, such as that of a proxy; may be repeated",
    )
    parser.add_argument(
        "--root-path", default="", metavar="PATH", help="the path under which a proxy serves the page, such as /demo"
    )


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.port <= 65535:
        raise MossError(f"--port is {args.port}, expected 1 to 65535")
    import moss_jax
    from moss_jax.serve.app import Demo
    from moss_jax.serve.session import warm_up

    folder = system_folder(args)
    system = moss_jax.load(folder)
    warm_up(system, say)
    demo = Demo(system, Path(args.model or folder).name)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that the temporary folder is removed
    try:
        address = demo.launch(args.host, args.port, False, args.allow_host, args.root_path)
        say(f"open {address} in a browser; press Ctrl-C to stop")
        demo.wait()
    finally:
        demo.close()
    return 0

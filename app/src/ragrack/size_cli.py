"""`ragrack size`: how many hosts, and what each must have."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ragrack.command import RefusedError, print_json


def add_commands(commands: Any) -> None:
    size = commands.add_parser("size", help="say how many hosts a service needs, and what each must have")
    what = size.add_mutually_exclusive_group(required=True)
    what.add_argument("--docs", metavar="N|DIR", help="how many documents there are, or the folder that holds them")
    what.add_argument("--nodes", type=int, metavar="N", help="how many nodes there are, where that is known")
    what.add_argument("--table", action="store_true", help="print docs/scaling.md's table of fleets instead")
    size.add_argument("--qps", type=float, default=1, metavar="N", help="questions a second at the peak (default 1)")
    size.add_argument(
        "--answer",
        choices=("retrieve", "extractive", "generate"),
        default="extractive",
        help="what a question is answered with (default extractive); a language model is a machine of its own",
    )
    size.add_argument("--tokens", type=int, default=200, metavar="N", help="of a generated answer (default 200)")
    size.add_argument("--cores", type=int, default=4, metavar="N", help="of a host (default 4)")
    size.add_argument("--memory", type=float, default=16, metavar="GIB", help="of a host (default 16)")
    size.add_argument("--spare", type=int, default=1, metavar="N", help="hosts that may be down at once (default 1)")
    size.add_argument("--changed", type=float, default=0.01, help="share that changes in a day (default 0.01)")
    size.add_argument(
        "--measured", type=Path, metavar="FILE", help="what bin/bench size measured on a machine of yours"
    )
    size.add_argument("--json", action="store_true")
    size.set_defaults(run=_size)


def _size(arguments: argparse.Namespace) -> int:
    from ragrack.sizing import Measured, SizeError, Wanted, size, table

    try:
        measured = Measured.load(arguments.measured)
        if arguments.table:
            print(table(measured), end="")
            return 0
        nodes = arguments.nodes
        if nodes is None:
            nodes = math.ceil(_documents(arguments.docs) * measured.nodes_per_document)
        host = (arguments.cores, arguments.memory, arguments.spare)
        wanted = Wanted(nodes, arguments.qps, *host, arguments.changed, arguments.answer, arguments.tokens)
        found = size(wanted, measured)
    except SizeError as error:
        raise RefusedError(str(error)) from error
    if arguments.json:
        print_json(asdict(found))
    else:
        print(f"{found.words()}\n(as measured on {measured.machine}; another machine's: --measured)")
    return 0


def _documents(text: str) -> int:
    if text.isdecimal():
        return int(text)
    directory = Path(text)
    if not directory.is_dir():
        raise RefusedError(f"--docs: {text!r} is neither a number nor a folder; give one of them")
    return sum(path.is_file() for path in directory.rglob("*"))

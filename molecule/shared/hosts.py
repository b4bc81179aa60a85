#!/usr/bin/env python3
"""Make and command test hosts: Debian machines of systemd-nspawn, reached by ssh.

hosts.py create --run demo --state .state/demo --persistent web=trixie
"""

import argparse
import subprocess
import sys
from pathlib import Path

from testhosts import image, runs
from testhosts.shell import HostsError, UnsuitableMachineError

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "hosts"


def say(message: str) -> None:
    """Tell the user how it goes; standard output is for what was asked for."""
    print(message, file=sys.stderr, flush=True)


def host(spec: str) -> tuple[str, str]:
    """Parse ``name=suite``."""
    name, _, suite = spec.partition("=")
    if not runs.NAME.fullmatch(name):
        raise argparse.ArgumentTypeError(f"{spec}: a name is 1 to 20 of a-z, 0-9 and -, and begins with a letter")
    if suite not in image.SUITES:
        raise argparse.ArgumentTypeError(f"{spec}: the suite is one of {', '.join(image.SUITES)}, as in {name}=trixie")
    return name, suite


def run_name(name: str) -> str:
    """Accept a run's name."""
    if not runs.NAME.fullmatch(name):
        raise argparse.ArgumentTypeError(f"{name}: a name is 1 to 20 of a-z, 0-9 and -, and begins with a letter")
    return name


def owner(value: str) -> str:
    """Accept a pid or the word molecule."""
    if value != "molecule" and not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{value}: neither a pid nor the word molecule")
    return value


def find_owner(value: str | None) -> runs.Owner | None:
    """Return the process that ``--owner`` means, or None for a run that nobody owns."""
    pid = runs.molecule_test() if value == "molecule" else int(value) if value else None
    return None if pid is None else runs.Owner.of(pid)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--run", type=run_name, help="name of the run")
    which.add_argument("--state", type=lambda path: Path(path).resolve(), help="directory of the run")

    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = top.add_subparsers(dest="verb", required=True)

    create = verbs.add_parser("create", parents=[which], help="make and start hosts; those that run are left alone")
    create.add_argument("--cache", type=Path, default=CACHE, help="where images are kept (default: %(default)s)")
    create.add_argument(
        "--host-vars", type=Path, help="also write <host>/connection.yml into this directory of an inventory"
    )
    life = create.add_mutually_exclusive_group(required=True)
    life.add_argument("--persistent", action="store_true", help="the run stays until it is destroyed")
    life.add_argument(
        "--owner",
        type=owner,
        metavar="PID|molecule",
        help="once that process is gone the next create of any run removes this one; molecule: the calling "
        "`molecule test`, and as --persistent if called by another command of Molecule's",
    )
    create.add_argument("hosts", nargs="+", type=host, metavar="HOST=SUITE", help=f"suite: {', '.join(image.SUITES)}")

    verbs.add_parser("destroy", parents=[which], help="remove the run and all that it made; fine if there is none")
    verbs.add_parser("list", parents=[which], help="show runs and hosts")
    for verb, text in {
        "start": "boot hosts that are down",
        "stop": "power hosts off in order",
        "kill": "pull the plug of hosts",
    }.items():
        command = verbs.add_parser(verb, parents=[which], help=text)
        command.add_argument("hosts", nargs="+", metavar="HOST")
    verbs.add_parser("inventory", parents=[which], help="print an Ansible inventory of connection variables")
    ssh = verbs.add_parser("ssh", parents=[which], help="log in, or run a command")
    ssh.add_argument("host", metavar="HOST")
    ssh.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")
    return top


def main() -> int:
    """Do what the command line asks."""
    try:
        args = parser().parse_args()
        return dispatch(args)
    except UnsuitableMachineError as error:
        say(f"hosts.py: {error}")
        return 2
    except HostsError as error:
        say(f"hosts.py: {error}")
        return 1


def dispatch(args: argparse.Namespace) -> int:
    """Call the verb."""
    if args.verb == "list":
        show(args.run, args.state)
        return 0
    if args.verb == "create":
        if not args.run or not args.state:
            raise HostsError("create needs --run NAME and --state DIR")
        known = runs.create(args.run, args.state, dict(args.hosts), find_owner(args.owner), args.cache.resolve(), say)
        if args.host_vars:
            runs.write_host_vars(known, args.host_vars.resolve())
        return 0
    if args.verb == "destroy":
        if not args.run and not args.state:
            raise HostsError("destroy needs --run NAME or --state DIR")
        for known in runs.all_runs():
            if args.run in (None, known.name) and args.state in (None, known.state):
                runs.destroy(known)
        return 0
    if args.verb == "ssh":
        known = runs.find(args.run, args.state, args.host)
        command = [*known.ssh, known.machine(args.host).address, *args.command]
        return subprocess.run(command, check=False).returncode
    known = runs.find(args.run, args.state, args.hosts[0] if args.verb != "inventory" else None)
    if args.verb == "inventory":
        print(runs.inventory(known), end="")
    elif args.verb == "start":
        runs.start(known, args.hosts, say)
    elif args.verb == "stop":
        runs.stop(known, args.hosts)
    else:
        runs.kill(known, args.hosts)
    return 0


def show(name: str | None, state: Path | None) -> None:
    """Print one line a host."""
    for known in runs.all_runs():
        if name in (None, known.name) and state in (None, known.state):
            for machine in known.machines:
                pid = machine.pid()
                life = f"up (pid {pid})" if pid else "down"
                print(
                    f"{known.name:12} {machine.name:16} {machine.suite:9} {machine.address:15} {life:16} {known.state}"
                )


if __name__ == "__main__":
    sys.exit(main())

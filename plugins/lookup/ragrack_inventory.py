"""All that is wrong with what the inventory sets for the roles."""

from __future__ import annotations

DOCUMENTATION = r"""
name: ragrack_inventory
short_description: Say what in the inventory's files no role knows, is of the wrong type or contradicts itself
description:
  - Reads the inventory's files (YAML or INI), its group_vars and host_vars, those of the playbooks, and C(-e).
  - Returns one line for each problem, with file and line. An empty list means that nothing is wrong.
  - With names of variables as terms, returns where each is set instead.
options:
  _terms:
    description: Names of variables.
    required: false
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- ansible.builtin.assert:
    that: lookup('ragrack_inventory', wantlist=true) | length == 0
"""

RETURN = r"""
_raw:
  description: A line for each problem, or for each place where one of the names is set.
  type: list
  elements: str
"""

import difflib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible.inventory.manager import InventoryManager
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.lookup import LookupBase
from ansible.utils.vars import load_extra_vars

SUFFIXES = ("", ".yml", ".yaml", ".json")
# What a variable was called, and what became of it. None: it is not needed any more.
RETIRED: dict[str, str | None] = {
    "deploy_batches": "release_batches",
    "deploy_confirm_timeout": "release_confirm_timeout",
    "deploy_strategy": "release_strategy",
    "nginx_certificate": "tls_certificate",
    "nginx_certificate_key": "tls_key",
    "nginx_upstreams": None,
}
# What the example inventories have where a value of one's own belongs.
PLACEHOLDER = "CHANGE-ME"
UNREADABLE = object()
"""The value of what only Ansible can read: a template, or what is encrypted."""


@dataclass(frozen=True)
class Given:
    """One variable as one file sets it. `of_host`: for that host; else for that group."""

    name: str
    value: Any
    scope: str
    of_host: bool
    file: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Known:
    """What the roles know: options by name, their prefixes, and which have one value for all app hosts."""

    options: Mapping[str, Mapping[str, Any]]
    prefixes: tuple[str, ...]
    fleet_wide: frozenset[str]

    @classmethod
    def of(cls, roles: Path) -> Known:
        """Read from the directory of the roles."""
        options: dict[str, Any] = {}
        for path in sorted(roles.glob("*/meta/argument_specs.yml")):
            for entry in yaml.safe_load(path.read_text())["argument_specs"].values():
                options |= entry.get("options", {})
        release_wide = yaml.safe_load((roles / "app/vars/main.yml").read_text())["app_settings"]
        fleet_wide = set(re.findall(r"\bapp_\w+", " ".join(release_wide.values())))
        fleet_wide |= {name for name in options if name.startswith("release_")}
        return cls(
            options, tuple(f"{path.name}_" for path in sorted(roles.iterdir()) if path.is_dir()), frozenset(fleet_wide)
        )


@dataclass
class Problems:
    """Each with its place, in the order of the files."""

    found: list[tuple[str, int, str]] = field(default_factory=list)

    def add(self, given: Given, text: str) -> None:
        self.found.append((given.file, given.line, text))

    def lines(self) -> list[str]:
        return [f"{file}:{line}: {text}" if line else f"{file}: {text}" for file, line, text in sorted(set(self.found))]


class _Loader(yaml.SafeLoader):
    """Takes tags that only Ansible knows for what cannot be read here."""


_Loader.add_multi_constructor("!", lambda *_: UNREADABLE)


def _value(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    except yaml.YAMLError:
        return UNREADABLE
    finally:
        loader.dispose()


def _pairs(node: yaml.Node | None) -> Iterator[tuple[str, yaml.Node, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), value, key.start_mark.line + 1


def variables(text: str, file: str, scope: str, *, of_host: bool) -> Iterator[Given]:
    """Those of a file in group_vars or host_vars. Raises yaml.YAMLError where it is no YAML."""
    yield from _set_in(yaml.compose(text, Loader=_Loader), scope, file, of_host=of_host)


def _set_in(node: yaml.Node | None, scope: str, file: str, *, of_host: bool) -> Iterator[Given]:
    for name, value, line in _pairs(node):
        yield Given(name, _value(value), scope, of_host, file, line)


def inventory(text: str, file: str) -> Iterator[Given]:
    """Those of an inventory's own file, YAML or INI."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        root = None
    if isinstance(root, yaml.MappingNode):
        for name, group, _ in _pairs(root):
            yield from _of_group(name, group, file)
    else:
        yield from _of_ini(text, file)


def _of_group(name: str, node: yaml.Node, file: str) -> Iterator[Given]:
    for part, inside, _ in _pairs(node):
        if part == "vars":
            yield from _set_in(inside, name, file, of_host=False)
        elif part == "hosts":
            for host, settings, _ in _pairs(inside):
                yield from _set_in(settings, host, file, of_host=True)
        elif part == "children":
            for child, group, _ in _pairs(inside):
                yield from _of_group(child, group, file)


def _of_ini(text: str, file: str) -> Iterator[Given]:
    section, kind = "ungrouped", "hosts"
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith(("#", ";")):
            continue
        if head := re.match(r"\s*\[([^:\]]+)(?::(\w+))?\]", line):
            section, kind = head[1], head[2] or "hosts"
        elif kind == "vars":
            name, _, value = line.partition("=")
            yield Given(name.strip(), _literal(value.strip()), section, False, file, number)
        elif kind == "hosts":
            host, *settings = shlex.split(line, comments=True)
            for name, _, value in (one.partition("=") for one in settings):
                yield Given(name, _literal(value), host, True, file, number)


def _literal(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def problems(
    given: Iterable[Given], known: Known, groups: Mapping[str, Iterable[str]], precedence: Mapping[str, Any]
) -> list[str]:
    """All that is wrong, one line each with file and line, sorted by place.

    `groups` holds the hosts of each group (of `all` every host), `precedence` what decides between two groups of a
    host: where it is the same, Ansible lets the later name win.
    """
    given, found = list(given), Problems()
    members = {name: frozenset(hosts) for name, hosts in groups.items()}
    for one in given:
        if one.scope and one.scope not in members and not (one.of_host and one.scope in members.get("all", ())):
            what = "host" if one.of_host else "group"
            found.found.append((one.file, 0, f"there is no {what} {one.scope}: nothing that is set here is used"))
        if one.value == PLACEHOLDER:
            found.add(one, f"{one.name} is still {PLACEHOLDER}: put your own value in")
        elif one.name.startswith(known.prefixes) or one.name in RETIRED:
            _known(one, known, found)
    ours = [one for one in given if one.name in known.options]
    _twice(ours, found)
    _one_for_all(ours, known, members, found)
    _siblings(ours, members, precedence, found)
    return found.lines()


def _known(one: Given, known: Known, found: Problems) -> None:
    if one.name in known.options:
        error = _ill_typed(one, known.options[one.name])
        if error:
            found.add(one, error)
    elif one.name in RETIRED:
        now = RETIRED[one.name]
        found.add(one, f"{one.name} is called {now} now" if now else f"{one.name} is not needed any more: take it out")
    else:
        near = difflib.get_close_matches(one.name, known.options, n=1, cutoff=0.75)
        found.add(one, f"no role knows {one.name}" + (f"; did you mean {near[0]}?" if near else ""))


def _readable(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_readable, [*value, *value.values()]))
    if isinstance(value, list):
        return all(map(_readable, value))
    return value is not UNREADABLE and not (isinstance(value, str) and ("{{" in value or "{%" in value))


def _ill_typed(one: Given, option: Mapping[str, Any]) -> str | None:
    if not _readable(one.value):
        return None
    # Null is what a key without a value is.
    if one.value is None:
        return f"{one.name} has no value: give it one, or take the line out"
    validator = ArgumentSpecValidator({one.name: _spec(option)})
    result = validator.validate({one.name: one.value})
    return "; ".join(result.error_messages) or None


def _spec(option: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: option[name] for name in ("type", "elements", "choices") if name in option}
    if "options" in option:
        inner = {name: _spec(one) | {"required": one.get("required", False)} for name, one in option["options"].items()}
        kept["options"] = inner
    return kept


def _same(values: Iterable[Given]) -> bool:
    return len({json.dumps(one.value, sort_keys=True, default=id) for one in values}) < 2


def _twice(given: list[Given], found: Problems) -> None:
    """Set in two places for the same group or host: the one that loses is read by nobody."""
    places: dict[tuple[str, str, bool], list[Given]] = {}
    for one in given:
        places.setdefault((one.name, one.scope, one.of_host), []).append(one)
    for several in places.values():
        first, *others = several
        for other in others:
            if other.file == first.file or not _same([first, other]):
                found.add(other, f"{other.name} is set for {other.scope} at {first.where}, too: keep one of them")


def _one_for_all(given: list[Given], known: Known, members: Mapping[str, frozenset[str]], found: Problems) -> None:
    """A release carries one value to all app hosts, whatever one of them has."""
    apps = members.get("app", frozenset())
    for one in given:
        if one.name not in known.fleet_wide:
            continue
        reached = {one.scope} if one.of_host else members.get(one.scope, frozenset())
        if reached & apps and not apps <= reached:
            found.add(
                one, f"{one.name} has one value for all app hosts: set it for the group app or all, not {one.scope}"
            )


def _siblings(
    given: list[Given], members: Mapping[str, frozenset[str]], precedence: Mapping[str, Any], found: Problems
) -> None:
    """Two groups of one precedence that share a host and do not agree: the alphabet decides."""
    by_name: dict[str, list[Given]] = {}
    for one in given:
        if not one.of_host and one.scope in precedence:
            by_name.setdefault(one.name, []).append(one)
    for several in by_name.values():
        for number, one in enumerate(several):
            for other in several[number + 1 :]:
                shared = members.get(one.scope, frozenset()) & members.get(other.scope, frozenset())
                apart = one.scope != other.scope and precedence[one.scope] == precedence[other.scope]
                if apart and shared and not _same([one, other]):
                    host = min(shared)
                    found.add(
                        other,
                        f"{other.name} is another for {other.scope} than for {one.scope} ({one.where}), and {host}"
                        f" is in both: set it for {host}, or for one of them",
                    )


def files(directory: Path) -> Iterator[tuple[str, Path]]:
    """Files of a group_vars or host_vars by the name of the group or host that they are for."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in inside:
            if file.is_file() and file.suffix in SUFFIXES and not file.name.startswith("."):
                yield (path.name if path.is_dir() else path.name.removesuffix(path.suffix)), file


class LookupModule(LookupBase):
    def run(self, terms: list[Any], variables: Any = None, **kwargs: Any) -> list[Any]:
        sources = [Path(source) for source in variables["ansible_inventory_sources"] if Path(source).exists()]
        given = [one for source in sources for one in self._of_inventory(source)]
        given += self._beside(Path(variables["playbook_dir"]))
        extra = load_extra_vars(self._loader)
        # What the command line sets is one value for all.
        given += [Given(name, value, "", False, f"-e {name}", 0) for name, value in extra.items()]
        if terms:
            return [f"{one.name}: {one.where}" for one in given if one.name in terms]
        roles = Path(variables["playbook_dir"]).parent / "roles"
        groups = InventoryManager(loader=self._loader, sources=[str(source) for source in sources]).groups
        precedence = {name: (group.depth, group.priority) for name, group in groups.items()}
        return problems(given, Known.of(roles), variables["groups"], precedence)

    def _of_inventory(self, source: Path) -> Iterator[Given]:
        own = [source] if source.is_file() else sorted(path for path in source.iterdir() if path.is_file())
        for file in own:
            if file.suffix in (*SUFFIXES, ".ini") and not file.stat().st_mode & 0o111:
                yield from inventory(self._text(file), str(file))
        yield from self._beside(source if source.is_dir() else source.parent)

    def _beside(self, directory: Path) -> Iterator[Given]:
        for kind, of_host in (("group_vars", False), ("host_vars", True)):
            for scope, file in files(directory / kind):
                try:
                    yield from variables(self._text(file), str(file), scope, of_host=of_host)
                except yaml.YAMLError as error:
                    raise AnsibleError(f"{file} is no YAML: {error}") from error

    def _text(self, file: Path) -> str:
        text: str = self._loader.get_text_file_contents(str(file))
        return text

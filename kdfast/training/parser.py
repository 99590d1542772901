"""Flags, YAML files and defaults merged into one set of options.

Later wins: script defaults, recipe, `--config` file, flags on the command line.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import traceback
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from kdfast.errors import UsageError, UserError, unknown

# What running somebody's module raises when the module is wrong.
_PLUGIN_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse that raises `UsageError` in one line and keeps defaults apart from given flags."""

    def __init__(self, **kwargs: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )
        self.fallbacks: dict[str, Any] = {}
        self.recipe = "crd"  # the one for sets other than digits

    def error(self, message: str) -> None:
        raise UsageError(message)

    def flag(self, group: Any, *names: str, default: Any = None, help: str, **kwargs: Any) -> None:
        """Add a flag; its default is kept in `fallbacks`, so that a given flag can be told."""
        if default not in (None, [], {}, False):
            shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
            help += f" (default: {shown})"
        action = group.add_argument(*names, default=argparse.SUPPRESS, help=help, **kwargs)
        self.fallbacks[action.dest] = default

    def switch(self, group: Any, name: str, *, default: bool = False, help: str) -> None:
        """Add `--name` and `--no-name`."""
        self.flag(group, name, default=default, help=help, action=argparse.BooleanOptionalAction)

    def actions(self) -> dict[str, argparse.Action]:
        """Flags by key, the name used in YAML: their names without the leading dashes.

        What has no dashes, as RUN, goes by its dest.
        """
        found = {}
        for action in self._actions:
            if action.dest in self.fallbacks:
                names = [name[2:] for name in action.option_strings if name.startswith("--")]
                names = names or [action.dest]
                if isinstance(action, argparse.BooleanOptionalAction):
                    names = names[:1]
                found |= dict.fromkeys(names, action)
        return found

    def converted(self, key: str, value: Any, where: str, said: str) -> Any:
        """The YAML value of `key` as the flag would have parsed it; errors call it `said`."""
        return _convert(said, self.actions()[key], value, where)

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The flags on the command line by dest; raises `UsageError` for what it does not know."""
        known, rest = self.parse_known_args([_dashes(token) for token in argv])
        if rest:
            flags = [name for action in self._actions for name in action.option_strings]
            if rest[0].startswith("-"):
                raise unknown("flag", rest[0].split("=")[0], flags)
            raise UsageError(f"unexpected argument '{rest[0]}'")
        return vars(known)


def _dashes(token: str) -> str:
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value


def _convert(key: str, action: argparse.Action, value: Any, where: str) -> Any:
    """The YAML value of `key` as the flag would have parsed it."""
    key = f"{where}: {key}"
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise UsageError(f"{key} must be true or false, got {value!r}")
        return value
    if isinstance(value, dict) and action.nargs in ("+", "*"):
        value = [f"{name}={item}" for name, item in value.items()]
    many = action.nargs in ("+", "*")
    values = value if isinstance(value, list) else [value]
    count = action.nargs or 1
    if not many and (len(values) != count or isinstance(value, dict)):
        wanted = "one value" if count == 1 else f"{count} values"
        raise UsageError(f"{key} takes {wanted}, got {value!r}")
    try:
        values = [action.type(str(item)) if action.type else str(item) for item in values]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"{key}: invalid value {value!r} ({error})") from None
    for item in values:
        if action.choices and item not in action.choices:
            raise unknown(f"value of {key}", str(item), map(str, action.choices))
    return values if action.nargs else values[0]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; keys with dashes. Never runs what a file asks to construct."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must be a mapping of flag names to values")
    return {str(key).replace("_", "-"): value for key, value in content.items()}


def recipe_names() -> list[str]:
    """The recipes that come with kdfast."""
    files = resources.files("kdfast") / "recipes"
    return sorted(file.name[:-5] for file in files.iterdir() if file.name.endswith(".yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe by name, or by path when it ends in .yaml; raises `UsageError` with the closest."""
    if name.endswith((".yaml", ".yml")):
        return read_yaml(Path(name))
    if name not in recipe_names():
        raise unknown("recipe", name, recipe_names())
    return read_yaml(Path(str(resources.files("kdfast") / "recipes" / f"{name}.yaml")))


def _by_dest(content: dict[str, Any], actions: dict[str, argparse.Action]) -> dict[str, Any]:
    return {actions[key].dest: value for key, value in content.items() if key in actions}


def _holding(
    where: str,
    conditional: Any,
    options: dict[str, Any],
    actions: dict[str, argparse.Action],
    foreign: set[str],
    canonical: Callable[[str, str], Sequence[str]],
) -> list[tuple[dict[str, Any], bool]]:
    """The entries of a recipe's `when` whose `if` holds for `options`, without that `if`.

    With each, whether that asks for a method.
    """
    entries = conditional if isinstance(conditional, list) else [conditional]
    holding = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("if"), dict):
            raise UsageError(f"{where}: each entry of when must be a mapping with an `if` mapping")
        holds = True
        for key, wanted in entry["if"].items():
            if key not in actions and key not in foreign:
                raise UsageError(f"{where}: when: {unknown('key', key, [*actions, *foreign])}")
            action = actions.get(key)
            chosen = _words(options.get(action.dest)) if action else []
            names = [
                {n for w in words for n in canonical(key, w)} for words in (chosen, _words(wanted))
            ]
            holds = holds and not names[0].isdisjoint(names[1])
        if holds:
            rest = {k: v for k, v in entry.items() if k != "if"}
            holding.append((rest, "method" in entry["if"]))
    return holding


def _words(value: Any) -> list[str]:
    if isinstance(value, dict):
        return []  # refused where it is converted
    values = value if isinstance(value, list | tuple) else [value]
    return [str(item) for item in values if item is not None]


def merge(
    parser: Parser,
    argv: Sequence[str],
    *,
    default_recipe: Callable[[str], str],
    foreign: set[str],
    canonical: Callable[[str, str], Sequence[str]] = lambda key, word: [word],
) -> argparse.Namespace:
    """All options of a script.

    `default_recipe(dataset)` names the recipe when none is given; keys of files that are in
    `foreign` belong to other scripts and are passed over. A recipe's `when` is a list of further
    mappings; each holds where the options named in its `if` have one of the values given there,
    words as `canonical(key, word)` spells them. Beside the flags the result has
    `given` (dests set by config or command line), `typed` (those of the command line), `settled`
    (those that a recipe's `when` sets for a method) and `layers_of_methods`, the `methods` mappings
    of recipe and config with the words for where they are, weakest first.
    """
    flags = parser.given(argv)
    config = read_yaml(Path(flags["config"])) if flags.get("config") else {}
    dataset = flags.get("dataset") or config.get("dataset") or parser.fallbacks["dataset"]
    name = flags.get("recipe") or config.get("recipe") or default_recipe(str(dataset))
    recipe = read_recipe(str(name))
    actions = parser.actions()
    options = copy.deepcopy(parser.fallbacks)
    given: set[str] = set()
    settled: set[str] = set()
    methods: list[tuple[str, dict]] = []
    where = f"recipe {name}"
    conditional = recipe.pop("when", [])
    known = {**_by_dest(recipe, actions), **_by_dest(config, actions), **flags}
    layers = [(where, recipe, False)]
    for part, by_method in _holding(
        where, conditional, options | known, actions, foreign, canonical
    ):
        layers.append((where, part, False))
        if by_method:
            settled |= {actions[key].dest for key in part if key in actions}
    layers.append((str(flags.get("config")), config, True))
    for where, content, chosen in layers:
        content = dict(content)
        layer = content.pop("methods", {})
        if not isinstance(layer, dict) or not all(isinstance(v, dict) for v in layer.values()):
            raise UsageError(f"{where}: methods must map method names to their options")
        methods.append((where, layer))
        for key, value in content.items():
            if key in ("config", "print-config", "plugin"):
                raise UsageError(f"{where}: {key} is taken from the command line only")
            if key in actions:
                dest = actions[key].dest
                if value is None or (value == [] and parser.fallbacks[dest] is None):
                    raise UsageError(f"{where}: {key} needs a value; without the line it is unset")
                options[dest] = _convert(key, actions[key], value, where)
                if chosen:
                    given.add(dest)
            elif key not in foreign:
                raise UsageError(f"{where}: {unknown('key', key, [*actions, *foreign])}")
    options |= flags
    options["recipe"] = str(name)
    return argparse.Namespace(
        **options,
        given=given | set(flags),
        typed=set(flags),
        settled=settled,
        layers_of_methods=methods,
    )


def load_plugin(argv: Sequence[str]) -> None:
    """Run the Python file given as `--plugin`, so that its methods get their flags.

    Read from the command line only: a recipe or config must not be able to run code.
    """
    scout = Parser(add_help=False)
    scout.add_argument("--plugin", action="append", default=[])
    for path in map(Path, scout.parse_known_args([_dashes(token) for token in argv])[0].plugin):
        if not path.is_file():
            raise UsageError(f"no plugin file at {path}")
        spec = importlib.util.spec_from_file_location(f"kdfast_plugin_{path.stem}", path)
        if spec is None:
            raise UsageError(f"plugin {path} is no Python file; its name must end in .py")
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except _PLUGIN_ERRORS as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == str(path.absolute())]
            where = f", line {lines[-1]}" if lines else ""
            raise UsageError(f"plugin {path}{where}: {type(error).__name__}: {error}") from None
        except UserError as error:
            raise UsageError(f"plugin {path}: {error}") from None

"""Command line of the programs: defaults < recipes < `--section.field value`, checked before anything is loaded."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

RECIPES = Path(__file__).parent / "recipes"
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
C = TypeVar("C", bound=BaseModel)


class ConfigError(ValueError):
    """A mistake in a recipe or on the command line, one line a mistake, in the user's words."""


def load_config(schema: type[C], argv: Sequence[str] | None = None, *, prog: str, recipe: str) -> C:
    """The validated configuration of `prog`; a mistake is printed (by rank 0 only) and ends the process with code 2.

    recipe: the embedded recipe that a bare command runs.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(schema, prog, recipe)
    try:
        return resolve(schema, argv, parser=parser, recipe=recipe)
    except ConfigError as error:
        exit_with(prog, error)


def resolve(schema: type[C], argv: Sequence[str], *, recipe: str, parser: argparse.ArgumentParser | None = None) -> C:
    """As `load_config`; raises ConfigError."""
    parser = parser or _parser(schema, "axpo", recipe)
    fields = dict(leaf_fields(schema))
    options, given = _parse(parser, argv, fields)
    values: dict[str, Any] = {}
    source: dict[str, str] = {}
    for name, content in _opened(given or [recipe]):
        _override(values, content)
        source |= dict.fromkeys(_dotted(content), f"recipe {name}: ")
    if len(given) > 1 and source.get("run.name") != f"recipe {given[-1]}: ":
        _override(values, {"run": {"name": "-".join(Path(name).stem for name in given)}})
        source["run.name"] = f"recipes {' '.join(given)}: "
    for name, text in options.items():
        section, leaf = name.split(".")
        if not isinstance(values.setdefault(section, {}), dict):
            continue  # reported below, with the recipe's other mistakes
        values[section][leaf] = _value(fields[name], text)
        source[name] = "--"
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, source, fields, values) for e in error.errors())) from None


def leaf_fields(schema: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """('section.field', its description and bounds), in the order of the schema."""
    for section, info in schema.model_fields.items():
        assert isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        for name, leaf in info.annotation.model_fields.items():
            yield f"{section}.{name}", leaf


def read_recipe(recipe: str) -> dict[str, Any]:
    """The values of an embedded recipe (by its name) or of a TOML file (by its path), with those that it goes on from.

    Raises:
        ConfigError: there is no such recipe, it is not TOML, or `recipes` in it is wrong.
    """
    values: dict[str, Any] = {}
    for _, content in _opened([recipe]):
        _override(values, content)
    return values


def _opened(recipes: Sequence[str], within: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, its own values) of each recipe, and before it of those in its `recipes`: later ones override earlier.

    `recipes = ["mini", "grpo"]` at the top of a file is what a command line of these two would be. A path in it is
    relative to the file.
    """
    for recipe in recipes:
        if recipe in within:
            raise ConfigError(f"recipe {within[0]!r}: its recipes lead back to {recipe!r}; leave one of them out")
        content = _read(recipe)
        earlier = content.pop("recipes", [])
        if not (isinstance(earlier, list) and all(isinstance(name, str) for name in earlier)):
            raise ConfigError(f'recipe {recipe}: recipes = {earlier!r}: must be a list of names, ["mini"]')
        folder = Path(recipe).parent
        earlier = [str(folder / name) if _is_path(name) else name for name in earlier]
        yield from _opened(earlier, (*within, recipe))
        yield recipe, content


def _override(values: dict[str, Any], content: dict[str, Any]) -> None:
    """Field by field. What is no table stays what it is, to be reported with the other mistakes."""
    for section, fields in content.items():
        before = values.get(section, {})
        if isinstance(before, dict):
            values[section] = {**before, **fields} if isinstance(fields, dict) else fields


def _is_path(recipe: str) -> bool:
    return recipe.endswith(".toml") or os.sep in recipe


def _read(recipe: str) -> dict[str, Any]:
    path = Path(recipe) if _is_path(recipe) else RECIPES / f"{recipe}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = recipe_names()
        known = f"the embedded recipes are {', '.join(names)}"
        raise ConfigError(f"recipe {recipe!r}: no such file or recipe{_nearest(recipe, names)}; {known}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {recipe!r}: not a TOML file ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {recipe!r}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"recipe {recipe[:80]!r}: cannot be read: {error.strerror}") from None


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _parser(schema: type[BaseModel], prog: str, recipe: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"[torchrun] -m {prog}" if prog.startswith("axpo.") else prog,
        description=(schema.__doc__ or "").strip().splitlines()[0],
        epilog=f"Later wins: defaults, recipes in their order, options. Embedded recipes: {', '.join(recipe_names())}.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=120),
        usage="%(prog)s [recipe.toml or recipe name ...] [--section.field value ...]",
    )
    several = "several, such as 'mini cispo', name the run after themselves unless the last one or --run.name does"
    parser.add_argument("recipe", nargs="*", help=f"TOML file or embedded recipe; {several} (default: {recipe})")
    tuned = _dotted(read_recipe(recipe))
    groups: dict[str, Any] = {}
    for name, info in leaf_fields(schema):
        section = name.split(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        shown = f"default: {_show(_default(schema, name))}"
        if tuned.get(name, _default(schema, name)) != _default(schema, name):
            shown += f"; recipe {recipe}: {_show(tuned[name])}"
        description = f"{info.description} ({shown})".replace("%", "%%")
        groups[section].add_argument(f"--{name}", metavar=_metavar(info), help=description, **_arity(info))
    return parser


def _parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], fields: dict[str, FieldInfo]
) -> tuple[dict[str, str], list[str]]:
    """Option texts by dotted name, and the recipes in their order; an unknown option is a ConfigError."""
    joined: list[str] = []
    words = iter(range(len(argv)))
    for i in words:
        word, following = argv[i], argv[i + 1] if i + 1 < len(argv) else None
        if word in ("-h", "--help"):
            parser.print_help()
            raise SystemExit(0)
        if not word.startswith("-"):
            joined.append(word)
            continue
        name, equals, _ = word.removeprefix("--").partition("=")
        if name not in fields:
            shown = word.partition("=")[0]
            raise ConfigError(f"{shown}: unknown field{_nearest(name.lstrip('-'), fields)}; --help lists all fields")
        if equals:
            joined.append(word)
        elif fields[name].annotation is bool and (following is None or _no_value(following)):
            joined.append(f"{word}=true")
        elif following is None or following.startswith("--"):
            raise ConfigError(f"--{name}: needs a value ({_metavar(fields[name])})")
        else:  # joined here, since argparse takes a value like -1e-3 for an option
            joined.append(f"{word}={following}")
            next(words)
    recipes = [word for word in joined if not word.startswith("--")]
    return vars(parser.parse_args([word for word in joined if word.startswith("--")])), recipes


def _no_value(word: str) -> bool:
    """Whether the word behind a bare truth-value option is something else: the next option, or the recipe."""
    return word.startswith("-") or word.endswith(".toml") or word in recipe_names()


def _value(info: FieldInfo, text: str) -> Any:
    """Lists from JSON or comma-separated words, truth values from their usual words; pydantic parses numbers."""
    if info.annotation is bool:
        return True if text.lower() in _TRUE else False if text.lower() in _FALSE else text
    if get_origin(info.annotation) in (list, tuple):
        if text.lstrip().startswith("["):
            try:
                return json.loads(text)
            except json.JSONDecodeError:
                return text
        return [word.strip() for word in text.split(",") if word.strip()]
    return text


def _explain(error: ErrorDetails, source: dict[str, str], fields: dict[str, FieldInfo], values: dict[str, Any]) -> str:
    """One line for one of pydantic's errors: where the value is from, field, value, what is wrong, a way out."""
    name = ".".join(str(part) for part in error["loc"][:2])
    sections = dict.fromkeys(field.split(".")[0] for field in fields)
    origin = source.get(name, "")
    if error["type"] == "value_error":  # the messages of axpo.config name field and value themselves
        message = error["msg"].removeprefix("Value error, ")
        return source.get(message.partition(" = ")[0], "") + message
    if error["type"] == "extra_forbidden":
        where = source.get(name) or next((v for k, v in source.items() if k.startswith(f"{name}.")), "")
        return f"{where}{name}: unknown field{_nearest(name, [*fields, *sections])}"
    if name not in fields:
        return f"{origin}{name} = {error['input']!r}: must be a table of fields"
    message = re.sub(r"^(Input|String|List|Tuple) should", "must", error["msg"])
    if error["type"] in ("missing", "too_long"):  # of a tuple such as optim.betas
        message = f"must have {len(get_args(fields[name].annotation))} values"
        error["input"] = values[name.split(".")[0]][name.split(".")[1]]
    hint = f" ({fields[name].description})" if error["type"] == "string_pattern_mismatch" else ""
    if get_origin(fields[name].annotation) is Literal:
        hint = _nearest(str(error["input"]), [str(choice) for choice in get_args(fields[name].annotation)])
    return f"{origin}{name} = {error['input']!r}: {message}{hint}"


def _nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' with the nearest known name, by its whole or its last part; empty when nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        leaves = {word.split(".")[-1]: word for word in reversed(known)}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(name.split(".")[-1], leaves, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]}?" if close else ""


def _dotted(values: dict[str, Any]) -> dict[str, Any]:
    """{'section.field': value}; a top-level value keeps its bare name."""
    flat: dict[str, Any] = {}
    for section, content in values.items():
        flat |= {f"{section}.{k}": v for k, v in content.items()} if isinstance(content, dict) else {section: content}
    return flat


def _default(schema: type[BaseModel], name: str) -> Any:
    section, leaf = name.split(".")
    return getattr(schema.model_fields[section].default, leaf)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return json.dumps(list(value))
    return "''" if value == "" else str(value)


def _metavar(info: FieldInfo) -> str:
    kind = info.annotation
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if kind is bool:
        return "true|false"
    if get_origin(kind) in (list, tuple):
        return "A,B,…"
    return "INT" if kind is int else "FLOAT" if kind is float else "TEXT"


def _arity(info: FieldInfo) -> dict[str, str]:
    return {"nargs": "?"} if info.annotation is bool else {}


def exit_with(prog: str, error: Exception, code: int = 2, *, every_rank: bool = False) -> NoReturn:
    """Ends the process with `code` and the error's own words, a line each.

    Only rank 0 speaks, since all have met the same, or with `every_rank` each that comes here.
    """
    if every_rank or int(os.environ.get("RANK", "0")) == 0:
        for line in str(error).splitlines():
            print(f"{prog}: error: {line}", file=sys.stderr)
    raise SystemExit(code)

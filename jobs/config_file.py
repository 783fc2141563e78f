"""From a YAML file, `--set a.b=c` and flags to one validated config, and from a refused config to sentences.

Every door (the `unetpp` command, `python -m jobs.<job>`, `python -m flows.<flow>`) goes through `load_config`, so that
a wrong value reads the same wherever it was written.
"""

import difflib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from jobs.config_schema import Schema, allowed, leaves, schema_at, schema_of
from unetpp.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)
KeyPath = tuple[str, ...]


def load_config(
    config_class: type[Config],
    file: str | Path | None = None,
    settings: Iterable[str] = (),
    flags: Mapping[KeyPath, object] | None = None,
) -> Config:
    """Validate a config once, from all its sources.

    Args:
        config_class: the pydantic class.
        file: YAML file with the config's keys, or None.
        settings: `a.b=c` each, `c` read as YAML; they replace what the file says.
        flags: values by key path; they replace what the settings say.

    Raises:
        ConfigError: one line for every problem: the field, what was seen and what is allowed.
    """
    tree = read_yaml(file) if file is not None else {}
    for setting in settings:
        path, value = parse_setting(setting)
        _assign(tree, path, value)
    for path, value in (flags or {}).items():
        _assign(tree, path, value)
    try:
        return config_class.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, config_class))) from None


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: the file is absent, unreadable, no YAML, or no mapping.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"config file {file} cannot be read: {reason}; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {file} is no valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config file {file} holds a {type(content).__name__}; wanted `key: value` lines")
    return content


def write_yaml(config: BaseModel) -> str:
    """Return the config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def write_command(job: str, config: BaseModel) -> str:
    """Return the `unetpp` command line that gives this config: what must be said, then what is not the default.

    A flag is repeated only where the command takes it more than once: a list in the place of one value, such as
    `num_workers: [1, 8]`, is a setting.
    """
    lists = {leaf.path for leaf in leaves(schema_of(type(config))) if leaf.is_list}
    required: list[str] = []
    changed: list[str] = []
    for path, value, default in _leaves(config):
        if value == default:
            continue
        dotted = ".".join(path).replace("_", "-")
        is_list = isinstance(value, list)
        if value in (None, []) or isinstance(value, bool | dict) or (is_list and path not in lists):
            words = ["--set", f"{'.'.join(path)}={json.dumps(value, ensure_ascii=False)}"]
        else:
            words = [word for each in (value if is_list else [value]) for word in _said(f"--{dotted}", str(each))]
        (required if default is _NONE_GIVEN else changed).extend(words)
    return shlex.join(["unetpp", job, *required, *changed])


def _said(flag: str, text: str) -> list[str]:
    """The words that give a flag a value; one that begins with a dash would be a flag by itself."""
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


_NONE_GIVEN = object()


def _leaves(config: BaseModel) -> Iterator[tuple[KeyPath, Any, Any]]:
    """(key path, value, default) of every value, in plain JSON types; sections are entered."""
    plain = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from (((name, *path), leaf, default) for path, leaf, default in _leaves(value))
            continue
        default = (
            _NONE_GIVEN if field.is_required() else to_jsonable_python(field.get_default(call_default_factory=True))
        )
        yield (name,), plain[name], default


def parse_setting(setting: str) -> tuple[KeyPath, object]:
    """Split `a.b=c` into its key path and its value, read as YAML.

    Raises:
        ConfigError: there is no `=`, an empty key, or the value is no YAML.
    """
    dotted, equals, text = setting.partition("=")
    path = tuple(part.strip().replace("-", "_") for part in dotted.split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {setting}: wanted a key, `=` and a value, such as --set model.level=3")
    try:
        return path, yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"--set {setting}: {text!r} is no valid YAML; quote it, as in --set '{dotted}=\"...\"'"
        ) from None


def _assign(tree: dict[str, Any], path: KeyPath, value: object) -> None:
    """Set `tree[a][b]... = value`, making sections on the way; `tree` is changed."""
    *sections, key = path
    for depth, name in enumerate(sections):
        below = tree.setdefault(name, {})
        if below is None:  # an empty section in YAML, such as `model:`
            below = tree[name] = {}
        if not isinstance(below, dict):
            here = ".".join(path[: depth + 1])
            raise ConfigError(f"{'.'.join(path)}: {here} is the value {below!r}, not a section with keys")
        tree = below
    tree[key] = value


# ------------------------------------------------------------------------------------------------ explain


def explain(error: ValidationError, config_class: type[BaseModel]) -> list[str]:
    """Return one sentence for every problem: the field, what was seen, what is allowed."""
    schema = schema_of(config_class)
    return [_sentence(detail, schema) for detail in error.errors(include_url=False)]


def _sentence(detail: ErrorDetails, schema: Schema) -> str:
    loc = tuple(part for part in detail["loc"] if part != "[key]")
    field = _dotted(loc)
    match detail["type"]:
        case "extra_forbidden":
            return _unknown_key(loc, schema)
        case "missing":
            about = (schema_at(schema, loc) or {}).get("description")
            flag = "--" + field.replace("_", "-")
            return f"{field} is missing{f' ({about})' if about else ''}: give it in the config file or with {flag}"
        case "value_error" | "assertion_error":
            reason = str(detail["ctx"]["error"])
            return f"{field}: {reason}" if field else reason
    at = schema_at(schema, loc)
    wanted = allowed(at) if at else detail["msg"].removeprefix("Input should be ")
    return f"{field}: saw {_seen(detail['input'])}, wanted {wanted}{_hint(detail['input'], at)}"


def _unknown_key(loc: tuple[int | str, ...], schema: Schema) -> str:
    section = schema_at(schema, loc[:-1]) or {}
    known = list(section.get("properties", {}))
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    where = f" in {_dotted(loc[:-1])}" if len(loc) > 1 else ""
    advice = f"did you mean {close[0]}?" if close else f"known keys{where}: {', '.join(known)}"
    return f"unknown key {loc[-1]}{'' if close is None else where}; {advice}"


def _dotted(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _seen(value: object) -> str:
    text = "nothing (null)" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _hint(value: object, schema: Schema | None) -> str:
    choices = [str(choice) for choice in (schema or {}).get("enum", [])]
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""

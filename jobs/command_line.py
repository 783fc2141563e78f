"""One command from one config class: its flags, its help, its exit codes. Jobs and flows share it.

Every value of the config is a flag (`--model.in-channels 1`), a `--set` key and a YAML key. Flags win over `--set`,
which wins over the file. The config is validated once, by pydantic; cyclopts only cuts the line into words.
"""

import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar

import yaml
from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.exceptions import UnknownOptionError, UnusedCliTokensError
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape

from jobs.config_file import load_config, write_yaml
from jobs.config_schema import Leaf, leaves, placeholder, schema_of
from jobs.contract import ExitCode
from unetpp.errors import (
    AbandonedError,
    BreakerError,
    ConfigError,
    ImageError,
    JobError,
    ModelError,
    StorageError,
    TransientError,
    UnetppError,
)

Config = TypeVar("Config", bound=BaseModel)

_EXIT_CODES: dict[type[UnetppError], ExitCode] = {
    ConfigError: ExitCode.CONFIG,
    ModelError: ExitCode.MODEL,
    StorageError: ExitCode.STORAGE,
    ImageError: ExitCode.STORAGE,  # of an object that is no image: a model's file, a list of images
    TransientError: ExitCode.STORAGE,
    BreakerError: ExitCode.BREAKER,
    AbandonedError: ExitCode.INTERRUPTED,
}

_GENERAL = Group("General", sort_key=(0,))
_REQUIRED = Group("Required (as a flag or in the config file)", sort_key=(1,))
_OPTIONS = Group("Options", sort_key=(2,))


def new_app(name: str, help: str) -> App:
    """Return an empty command `name` to add commands to."""
    return App(
        name=name,
        help=help,
        help_format="rich",
        version_flags=[],
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )


def add_command(
    app: App, name: str, config_class: type[Config], run: Callable[..., int], switches: Mapping[str, str] | None = None
) -> None:
    """Add `app name --flags`: it loads a `config_class` and ends with the exit code that `run` returns.

    `switches` (name -> help) are flags beside the config; `run` gets them as keywords: text, or None where not given.
    """
    app.command(_command(config_class, run, switches or {}), name=name, sort_key=len(list(app)))


def set_command(app: App, config_class: type[Config], run: Callable[[Config], int]) -> None:
    """Make `app --flags` itself load a `config_class` and end with the exit code that `run` returns."""
    app.default(_command(config_class, run, {}))


def run_app(app: App, words: Iterable[str] | None = None) -> int:
    """Parse the command line, run the command and return its exit code; every error becomes one.

    A mistake of the caller is a sentence on stderr; only what nobody foresaw shows a traceback.
    """
    return _guarded(app.name[0], lambda: app(words, exit_on_error=False, print_error=False))


def run_plain(name: str, run: Callable[[], object]) -> int:
    """Run a command without flags and return its exit code; every error becomes one."""
    return _guarded(name, run)


def _guarded(name: str, run: Callable[[], object]) -> int:
    try:
        code = run()
        return int(code) if isinstance(code, int) else int(ExitCode.DONE)
    except CycloptsError as error:
        _say(name, [_mistyped(error)])
        return int(ExitCode.CONFIG)
    except KeyboardInterrupt:
        _say(name, ["interrupted; the same command goes on from here"])
        return int(ExitCode.INTERRUPTED)
    except Exception as error:
        known = _project_error(error)
        if known is None:
            traceback.print_exception(error)
            return int(ExitCode.OTHER)
        _say(name, str(known).splitlines())
        return exit_code(known)


def exit_code(error: UnetppError) -> int:
    """Return the exit code of an error; a job's own code is passed on."""
    if isinstance(error, JobError):
        return error.exit_code if error.exit_code and error.exit_code > 0 else int(ExitCode.OTHER)
    for kind, code in _EXIT_CODES.items():
        if isinstance(error, kind):
            return int(code)
    return int(ExitCode.OTHER)


def _project_error(error: BaseException | None) -> UnetppError | None:
    """Find the project's own error: the error itself, or the cause a framework wrapped."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, UnetppError):
            return error
        seen.add(id(error))
        error = error.__cause__
    return None


def _mistyped(error: CycloptsError) -> str:
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"unexpected word {error.unused_tokens[0]!r}: a value follows its flag; --help lists the flags."
    if isinstance(error, UnknownOptionError) and not (word := error.token.keyword or error.token.value).startswith(
        "--"
    ):
        return (
            f"{word!r} is no flag; a value that begins with a dash is given as --flag={word}. --help lists the flags."
        )
    return f"{' '.join(str(error).split())} --help lists what there is."


def _say(program: str, sentences: Iterable[str]) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
    for sentence in sentences:
        console.print(f"[bold red]{program}:[/] {escape(sentence)}")


# -------------------------------------------------------------------------------------------------- flags


def _command(config_class: type[Config], run: Callable[..., int], switches: Mapping[str, str]) -> Callable[..., int]:
    """Return a function whose signature is the config's flags, for cyclopts to read."""
    by_name = {"__".join(leaf.path): leaf for leaf in leaves(schema_of(config_class))}

    in_place = [name for name, leaf in by_name.items() if leaf.is_positional]

    def command(
        *places: str, config: str | None = None, set: list[str] | None = None, print_config: bool = False, **words: Any
    ) -> int:
        words |= dict(zip(in_place, places, strict=False))
        switched = {name: words.pop(name, None) for name in switches}
        flags = {by_name[name].path: _value(by_name[name], word) for name, word in words.items() if word is not None}
        checked = load_config(config_class, config, set or (), flags)
        if print_config:
            sys.stdout.write(write_yaml(checked))
            return int(ExitCode.DONE)
        return run(checked, **switched)

    command.__doc__ = config_class.__doc__
    command.__annotations__ = {}  # the signature alone says what the flags are
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        sorted(
            [
                *_general_flags(),
                *(_switch(name, help) for name, help in switches.items()),
                *(_flag(name, leaf) for name, leaf in by_name.items()),
            ],
            key=lambda flag: flag.kind,
        )
    )
    return command


def _general_flags() -> list[inspect.Parameter]:
    def flag(name: str, kind: Any, help: str, **more: Any) -> inspect.Parameter:
        return _keyword(name, kind, help=help, group=_GENERAL, negative=(), **more)

    return [
        flag("config", str, "YAML file with any of the keys below", metavar="FILE"),
        flag("set", list[str], "set one key, the value read as YAML; repeatable", metavar="KEY=VALUE"),
        flag("print_config", bool, "print the validated config as YAML and stop"),
    ]


def _switch(name: str, help: str) -> inspect.Parameter:
    kind = bool if help.endswith("(switch)") else str
    return _keyword(name, kind, help=help.removesuffix(" (switch)"), group=_GENERAL, negative=())


def _flag(name: str, leaf: Leaf) -> inspect.Parameter:
    kind = bool if leaf.is_switch else list[str] if leaf.is_list else str
    return _keyword(
        name,
        kind,
        "--" + leaf.dotted.replace("_", "-"),
        leaf.is_positional,
        help=_help(leaf),
        group=_group(leaf),
        metavar=None if leaf.is_switch else placeholder(leaf.schema),
        negative=None if leaf.is_switch and leaf.default is True else (),
    )


def _keyword(
    name: str, kind: Any, flag: str | None = None, is_positional: bool = False, **note: Any
) -> inspect.Parameter:
    """Return a keyword that is None where the line does not have it."""
    annotation = Annotated[kind | None, Parameter(flag, show_default=False, **note)]
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD if is_positional else inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, place, default=None, annotation=annotation)


def _group(leaf: Leaf) -> Group:
    if len(leaf.path) == 1:
        return _REQUIRED if leaf.required else _OPTIONS
    section = ".".join(leaf.path[:-1])
    return Group(section, help=escape(leaf.section_about), sort_key=(3, section))


def _help(leaf: Leaf) -> str:
    text = escape(leaf.schema.get("description", ""))
    if leaf.required or leaf.default is None or (leaf.is_switch and leaf.default is False):
        return text
    default = ",".join(map(str, leaf.default)) if isinstance(leaf.default, list) else leaf.default
    return f"{text} [dim]{escape(f'[default: {default}]')}[/dim]"


def _value(leaf: Leaf, word: Any) -> object:
    """Return a flag's words as a plain value; whether it is allowed is pydantic's business."""
    if leaf.is_switch or leaf.is_free_text or (leaf.may_be_text and not word.startswith("[")):
        return word
    if not leaf.is_list:
        return _yaml(word)
    return [value for part in word for value in _yaml(f"[{part.strip('[]')}]")]


def _yaml(word: str) -> Any:
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word

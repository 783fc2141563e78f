"""A flow as a command, with the jobs' loader and exit codes: `python -m flows.<flow> --config F [--set a.b=c]`."""

import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from pydantic import BaseModel

from jobs import logs
from jobs.command_line import new_app, run_app, set_command
from jobs.contract import ExitCode

Config = TypeVar("Config", bound=BaseModel)


def main(name: str, config_class: type[Config], run: Callable[[Config], None]) -> NoReturn:
    """Be the process of one flow: load the config, run, exit with the code of what went wrong, if anything did."""

    def command(config: Config) -> int:
        run(config)
        return int(ExitCode.DONE)

    app = new_app(name, config_class.__doc__ or "")
    set_command(app, config_class, command)
    logs.configure()
    sys.exit(run_app(app))

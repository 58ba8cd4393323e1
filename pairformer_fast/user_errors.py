"""Run a command line so that what its user can mend is one line on stderr, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer
from pydantic import ValidationError

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130


def run_app(app: typer.Typer, name: str, mendable: tuple[type[Exception], ...]) -> NoReturn:
    """Run an app and exit: with status 2 after an error that the user can mend, with 130 after an interruption.

    Parameters
    ----------
    app : typer.Typer
    name : str
        Begins every message.
    mendable : tuple of type
        Exceptions whose message tells the user what to change; others are faults of the program and keep their
        traceback.
    """
    try:
        status = app(standalone_mode=False)
    except typer.TyperException as error:  # options that typer cannot parse
        if error.format_message():  # empty where the help was shown for want of a command
            complain(name, error.format_message().replace("Value error, ", ""))
        sys.exit(USER_ERROR)
    except ValidationError as error:
        complain(name, "; ".join(_explain(detail) for detail in error.errors()))
        sys.exit(USER_ERROR)
    except mendable as error:
        complain(name, _message(error))
        sys.exit(USER_ERROR)
    except typer.Abort:
        status = INTERRUPTED
    if status == INTERRUPTED:  # what typer makes of KeyboardInterrupt
        complain(name, "interrupted")
    sys.exit(status or 0)


def run_script(main: Callable[..., Any]) -> NoReturn:
    """Run the function of a script of the repository, with its arguments from the command line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run_app(app, Path(sys.argv[0]).name, (OSError, ValueError, ImportError))


def complain(name: str, message: str) -> None:
    """Print a message as one line on stderr."""
    typer.echo(f"{name}: {' '.join(message.split())}", err=True)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _explain(detail: Any) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    return f"--{str(detail['loc'][0]).replace('_', '-')}: {message}" if detail["loc"] else message

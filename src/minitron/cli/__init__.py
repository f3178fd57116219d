"""The command line: parse, call one function, print."""

import logging
import os
import sys

import typer

from minitron.cli import making, measuring  # noqa: F401  they add their verbs
from minitron.cli.options import app
from minitron.errors import StoppedError, UserError

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; what the user did wrong is one `error: …` line and exit status 2."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own progress is on the screen
    # Before torch is loaded: threads that wait for others sleep; awake, they would take the cores from those others
    # where further processes compute, which makes small operations up to nine times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]  # of the click that this typer carries
    try:
        sys.exit(app(standalone_mode=False))
    except UserError as error:
        _fail(str(error))
    except usage_error as error:
        if len(sys.argv) < 2:
            print(error, file=sys.stderr)
            sys.exit(2)
        _fail(error.format_message())  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted: the same command continues a compress run", file=sys.stderr)
        sys.exit(130)
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except BaseException as error:  # safetensors and torch have exceptions that derive from it directly
        if isinstance(error, PermissionError):
            _fail(f"permission denied: {error.filename}")
        if _is_out_of_space(error):
            _fail("no space left on the device; what was finished is kept, free some and run again")
        raise


def _is_out_of_space(error: BaseException | None) -> bool:
    # safetensors and torch wrap the operating system's error in exceptions of their own.
    while error is not None:
        if "No space left on device" in str(error) or "os error 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)

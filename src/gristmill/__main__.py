"""The program `gristmill`, also as `python -m gristmill`: Ctrl-C is quiet from here on, imports included."""

import os
import signal
from typing import NoReturn


def _leave(_signal: int, _frame: object) -> NoReturn:
    os._exit(
        130
    )  # as `gristmill.terminal.output.INTERRUPTED`; nothing has been written yet, or all is flushed


def main() -> None:
    """Runs this process's command line and exits."""
    # Where SIGINT is ignored, as in a shell's background job, it stays so.
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, _leave)
    from gristmill.cli import main as run

    try:
        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:
        os._exit(130)
    finally:
        if heard:
            signal.signal(signal.SIGINT, _leave)


if __name__ == "__main__":
    main()

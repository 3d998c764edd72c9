"""What every test may count on."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    # Shells start background jobs with SIGINT ignored, and every child inherits that; the tests send it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

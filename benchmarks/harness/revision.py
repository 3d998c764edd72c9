"""Which code was measured."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def commit(root: Path) -> Mapping[str, Any]:
    """The revision that is measured, and whether files differ from it."""

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/native")
    return {"commit": git("rev-parse", "--short=12", "HEAD"), "changed": bool(changed)}


def named(result: Mapping[str, Any]) -> str:
    """What `commit` gave, for a page."""
    return f"{result['commit']}{' with changes' * result['changed']}"

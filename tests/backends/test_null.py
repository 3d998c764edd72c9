"""The null executor keeps the protocol, and needs nothing but NumPy."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from gristmill.backends.null import NullExecutor
from gristmill.errors import GristmillError, UsageError
from gristmill.models import build_program
from gristmill.program.batch import Batch, CancelFlag
from tests.kits import files
from tests.kits.executor import PROMPT, batch_of, check_executor


def test_protocol() -> None:
    check_executor(NullExecutor(build_program(files.config("gemma3_text"))))


class Leaky(NullExecutor):
    """Breaks one rule of the contract by one unit in the last place."""

    def __init__(self, rule: str) -> None:
        super().__init__(build_program(files.config("llama")))
        self.rule = rule

    def step(self, batch: Batch, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        if self.rule == "cancellation":
            cancel = None
        before = [view.length for view in batch.views]
        logits = super().step(batch, cancel)
        broken = {
            "row count": len(batch.tokens) == 16,
            "neighbours": len(batch.views) == 2,
            "cuts": any(n % 16 for n in before if n < 53),
        }
        if broken.get(self.rule) and logits.size:
            at = logits.argmax(1)[-1]
            logits[-1, at] = np.nextafter(logits[-1, at], np.float32(11))
        return logits


@pytest.mark.parametrize("rule", ["row count", "neighbours", "cuts", "cancellation"])
def test_the_kit_notices_a_broken_rule(rule: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_executor(Leaky(rule))


def test_stop() -> None:
    executor = NullExecutor(build_program(files.config("llama")), stop=7, stop_at=5)
    view = executor.allocate(16)
    logits = executor.step(batch_of([(view, np.arange(10, dtype=np.int32), PROMPT)]))
    assert (logits.argmax(1)[5:] == 7).all()
    assert not (logits.argmax(1)[:5] == 7).all()
    with pytest.raises(UsageError, match="vocabulary"):
        NullExecutor(executor.program, stop=272)


def test_bytes_and_closing() -> None:
    executor = NullExecutor(build_program(files.config("gemma3_text")))
    view = executor.allocate(100)
    executor.step(batch_of([(view, np.zeros(50, np.int32), PROMPT)]))
    # One layer keeps 50 tokens, the other its window of 24: keys and values of 2 heads of 64 in 2 bytes.
    assert view.nbytes() == (50 + 24) * 2 * 2 * 64 * 2
    view.close()
    with pytest.raises(GristmillError, match="closed"):
        _ = view.length


def test_views_of_another_executor_are_refused() -> None:
    program = build_program(files.config("llama"))
    view = NullExecutor(program).allocate(4)
    with pytest.raises(UsageError, match="another executor"):
        NullExecutor(program).step(batch_of([(view, np.zeros(1, np.int32), PROMPT)]))


def test_imports_stay_light() -> None:
    code = (
        "import sys, gristmill.backends.null, gristmill.backends.reference, gristmill.program.render;"
        "print([m for m in ('torch', 'transformers', 'gristmill.backends.native') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

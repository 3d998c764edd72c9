"""What a mode costs in quality, measured against a base model: KL divergence, top-1 agreement, perplexity."""

from __future__ import annotations

from gristmill.evaluate.greedy import Divergence, audit_greedy
from gristmill.evaluate.measure import compare, run
from gristmill.evaluate.metrics import Quality
from gristmill.evaluate.tables import render

__all__ = ["Divergence", "Quality", "audit_greedy", "compare", "render", "run"]

"""What there is to say about the methods: paper, slots, options, and the evidence of stored runs."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from gristmill.methods.registry import method, names


def evidence() -> dict[str, dict[str, Any]]:
    """Method name -> figures of a stored run: machine, commit, model, recipe, bits, KL, speed ratios.

    The file is written by `benchmarks/methods.py`, never by hand.
    """
    path = files("gristmill.methods") / "evidence.json"
    return json.loads(path.read_text(encoding="utf-8"))["methods"] if path.is_file() else {}


def listing() -> list[dict[str, Any]]:
    """Every method: name, title, paper, slots (with its default options), calibrated, evidence or None."""
    measured = evidence()
    result = []
    for name in names():
        found = method(name)
        result.append(
            {
                "name": name,
                "title": found.title,
                "paper": found.paper,
                "slots": list(found.slots(found.options())),
                "calibrated": found.calibrated,
                "evidence": measured.get(name),
            }
        )
    return result


def describe(name: str) -> dict[str, Any]:
    """One method with its options: for each its type, default and limits, as JSON schema."""
    found = method(name)
    entry = next(e for e in listing() if e["name"] == name)
    schema = found.options.model_json_schema()
    return {**entry, "about": schema.get("description", ""), "options": schema.get("properties", {})}

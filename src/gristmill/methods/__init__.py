"""Published methods, one file each, in folders by what they change; and the recipes that combine them."""

from __future__ import annotations

from gristmill.methods.base import EXCLUSIVE, PRECEDES, Method, Options
from gristmill.methods.registry import method, names

__all__ = ["EXCLUSIVE", "PRECEDES", "Method", "Options", "method", "names"]

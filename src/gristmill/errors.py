"""Errors that gristmill reports in one line.

The command line prints the message of a `GristmillError` and exits with status 1, or 2 for a `UsageError`.
Anything else that escapes is a bug: one line, too, but a traceback if GRISTMILL_DEBUG is set.
"""

from __future__ import annotations

__all__ = [
    "Cancelled",
    "GristmillError",
    "KVExhausted",
    "ModelError",
    "TemplateError",
    "TokenizerError",
    "UsageError",
]


class GristmillError(Exception):
    """Base of every error whose message is meant for the user."""


class UsageError(GristmillError):
    """The request itself is wrong: an unknown option, a value out of range."""


class ModelError(GristmillError):
    """A model file is missing, damaged, inconsistent or of an unsupported kind."""


class TokenizerError(ModelError):
    """The tokenizer of a model is missing, damaged or of an unsupported kind."""


class TemplateError(GristmillError):
    """A chat template or the messages given to it cannot be rendered."""


class Cancelled(GristmillError):
    """The work was stopped through a cancel flag."""


class KVExhausted(GristmillError):
    """No memory is left for more keys and values."""

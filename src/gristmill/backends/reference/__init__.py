"""The reference backend: every op in plain PyTorch, in any float dtype, differentiable; extra `torch`.

Nothing is imported before `ReferenceExecutor` is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gristmill.backends.reference.executor import ReferenceExecutor, ReferenceKVView

__all__ = ["ReferenceExecutor", "ReferenceKVView"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from gristmill.backends.reference import executor
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from gristmill.errors import GristmillError

        raise GristmillError("the reference executor needs PyTorch: pip install 'gristmill[torch]'") from None
    return getattr(executor, name)

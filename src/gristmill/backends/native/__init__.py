"""Runs programs on the CPU through the C++ kernels: one native call per step, with the GIL released."""

from gristmill.backends.native.executor import NativeExecutor

__all__ = ["NativeExecutor"]

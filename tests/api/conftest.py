"""The demo model, converted once per session into a cache of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gristmill.api import Model, load
from gristmill.backends.native import _native


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRISTMILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


ONE_ARITHMETIC = "bf16" if _native.default_level() == "amx" else None
"""Activations of one arithmetic for both phases, so that an answer kept equals one read anew."""


@pytest.fixture(scope="session")
def model(cache: None) -> Iterator[Model]:
    with load("smollm2", threads=2, activations=ONE_ARITHMETIC) as loaded:
        yield loaded

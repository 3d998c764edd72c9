"""The demo model, converted once per session into a cache of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gristmill.api import Model, load


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRISTMILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def model(cache: None) -> Iterator[Model]:
    with load("smollm2", threads=2) as loaded:
        yield loaded

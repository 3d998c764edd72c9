"""Small models that recipes are applied to, with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kits import models


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of the shape of SmolLM2, in small, random."""
    directory = tmp_path_factory.mktemp("methods") / "small"
    return models.save(directory, models.configs()["llama-smollm2"])[0]

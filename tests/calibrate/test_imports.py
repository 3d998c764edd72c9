"""What of calibration works without PyTorch: sites, folding, planting and text."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
sys.modules["torch"] = None  # an import of it fails
from gristmill.calibrate.planted import plant
from gristmill.calibrate.text import CalibrationText, _topics
from gristmill.models import build_program
from tests.kits import files, models

of = models.configs()["llama"]
weights = files.weights(of)
assert plant(build_program(of), weights).keys() == weights.keys()
assert _topics().content
"""


def test_without_pytorch() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

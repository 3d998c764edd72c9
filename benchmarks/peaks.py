"""Prints the arithmetic that this machine can do at most: f32, bf16 and int8 operations per second.

Compiles `peaks.cc` for this processor and runs it on as many processors at once as are asked for. Beside it
`gristmill bench` says how many operations per second a prompt takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("peaks.cc")


def main() -> int:
    """Runs the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="processors at once (default 2)")
    parser.add_argument("--json", action="store_true", help="operations per second as JSON")
    arguments = parser.parse_args()
    compiler = shutil.which("c++")
    if compiler is None:
        print("peaks: there is no C++ compiler", file=sys.stderr)
        return 1
    if not 1 <= arguments.threads <= 1024:
        print("peaks: --threads must be between 1 and 1024", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "peaks")
        command = [compiler, "-O2", "-std=c++20", "-march=native", str(SOURCE), "-o", program]
        if subprocess.run(command, check=False).returncode:
            print("peaks: the compiler failed", file=sys.stderr)
            return 1
        running = [
            subprocess.Popen([program], stdout=subprocess.PIPE, text=True) for _ in range(arguments.threads)
        ]
        found = [json.loads(process.communicate()[0]) for process in running]
    total = {name: sum(one[name] for one in found) for name in found[0]}
    if arguments.json:
        print(json.dumps(total))
    else:
        for name, rate in total.items():
            print(f"{name:36}{rate / 1e9:8,.0f} Gop/s on {arguments.threads} processors")
    return 0


if __name__ == "__main__":
    sys.exit(main())

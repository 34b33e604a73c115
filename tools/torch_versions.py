"""Try one wheel with several PyTorch and Python versions: ``python -m tools.torch_versions WHEEL``.

For each pair a fresh environment is made, and deleted after: PyTorch, the wheel, and what the tests need.
There the kernels' tests and those of the promises run, and the bits of everything are recorded
(``tools/record_bits.py``). What comes out is the table of ``docs/install.md``. Builds of PyTorch take
gigabytes each; one is there at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/norms/test_norm_kernels.py",
    "tests/norms/test_norms.py",
    "tests/ops/test_extension.py",
    "tests/ops/test_autograd_tools.py",
    "tests/recurrent/test_recurrent_kernels.py",
    "tests/recurrent/test_recurrent_promises.py",
    "tests/recurrent/test_gates.py",
    "tests/recurrent/test_resets.py",
    "tests/streaming/test_streaming.py",
)
PACKAGES = ("numpy<3", "pytest>=8.3", "pytest-xdist", "expecttest", "hypothesis", "sybil")
FACTS = """
import json, sys, torch, layernorm
from layernorm import ops
from layernorm.pytorch_internals import used_by_the_kernels
print(json.dumps({"python": sys.version.split()[0], "torch": torch.__version__, "problem": ops.NATIVE_PROBLEM,
                  "found": ops.native.reached() if ops.native else {}}))
"""


class Pair(NamedTuple):
    """A Python and a PyTorch."""

    python: str  # an interpreter
    torch: str

    @classmethod
    def of(cls, text: str) -> Pair:
        """Read ``PYTHON:TORCH``, such as ``python3.12:2.11.0``."""
        python, _, torch = text.rpartition(":")
        if not python or not re.fullmatch(r"\d+\.\d+(\.\d+)?", torch):
            raise argparse.ArgumentTypeError(f"expected PYTHON:TORCH such as python3.12:2.11.0, got {text!r}")
        return cls(python, torch)


def run(*command: str | Path, check: bool = True) -> str:
    """Run a command in the checkout; return what it printed."""
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def try_pair(pair: Pair, wheel: Path, logs: Path) -> str:
    """Return the row of a pair."""
    with tempfile.TemporaryDirectory() as folder:
        run(pair.python, "-m", "venv", folder)
        python = Path(folder) / "bin/python"
        install = (python, "-m", "pip", "install", "--quiet", "--no-cache-dir")
        run(*install, f"torch=={pair.torch}", *PACKAGES)
        run(*install, "--no-deps", wheel)
        facts = json.loads(run(python, "-W", "error", "-c", FACTS).splitlines()[-1])
        if facts["problem"]:
            return f"| {facts['python']} | {facts['torch']} | none: {facts['problem']} | | | | |"
        bits = run(python, "-m", "tools.record_bits", Path(folder) / "bits.json")
        printed = run(
            python, "-m", "pytest", "-q", "-n", "auto", "-p", "no:cacheprovider", *TESTS, check=False
        )
        (logs / f"{facts['python']}-{facts['torch']}.txt").write_text(printed, encoding="utf-8")
        counts = printed.splitlines()[-1].strip("= ").partition(" in ")[0] if printed else "no result"
        found = facts["found"]
        cells = (
            facts["python"],
            facts["torch"],
            "exchange" if found["exchange"] else "attributes",
            "PyTorch's" if found["threads"] else "own",
            "C" if found["allocation"] else "Python",
            bits.split()[-1],
            counts,
        )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("pairs", type=Pair.of, nargs="+", metavar="PYTHON:TORCH")
    parser.add_argument(
        "--logs", type=Path, default=Path("build/torch_versions"), help="what the tests printed"
    )
    given = parser.parse_args()
    if not given.wheel.is_file():
        parser.error(f"there is no wheel {given.wheel}")
    for pair in given.pairs:
        if shutil.which(pair.python) is None:
            parser.error(f"there is no {pair.python}")
    given.logs.mkdir(parents=True, exist_ok=True)
    print("| Python | PyTorch | tensors read by | threads | results made by | bits | tests |")
    print("|---|---|---|---|---|---|---|")
    for pair in given.pairs:
        print(try_pair(pair, given.wheel.resolve(), given.logs), flush=True)


if __name__ == "__main__":
    sys.exit(main())

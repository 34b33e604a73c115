"""Run the recurrent tests of PyTorch's own test_nn.py with layernorm's modules in torch.nn's place.

``python -m tests.recurrent.judge_by_test_nn path/to/pytorch/test/test_nn.py`` runs every test that
names a recurrent module, first with torch.nn's, then with ours, once for each preset, each in a process
of its own. It prints what fails where, and exits with 1 if a test fails that passes with torch.nn. The
file belongs to PyTorch's sources, not to its wheel; take it from the release that is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import unittest
from pathlib import Path

import torch

import layernorm
from layernorm.variants import PRESETS

MODULES = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn", "LSTMCell": "lstm", "GRUCell": "gru", "RNNCell": "rnn"}
NAMES = re.compile(rf"\b({'|'.join(MODULES)})\b")
# A test's helper may be what names the module.
TITLES = re.compile("rnn|lstm|gru|cell", re.IGNORECASE)
# Tests that a normalized formula fails by what it is, each with what of the formula it depends on.
OF_THE_FORMULA = {
    "test_rnn_weight_norm": "it counts the parameters of a layer, and gains and biases are more",
    "test_variable_sequence": "its tolerance is 1e-5 whatever the gradients, and norms over 4 numbers make "
    "them 1e3 (in float64 packed and separate sequences agree to 1e-12)",
}


def put_in_place(variant: str) -> None:
    """Set layernorm's modules, with a preset as the default, where torch.nn has its own."""
    for name, mode in MODULES.items():
        if mode not in PRESETS[variant]:
            continue
        ours = getattr(layernorm, f"LayerNorm{name}")

        def init(self, *args, ours=ours, **kwargs):
            ours.__init__(self, *args, **{"variant": variant} | kwargs)

        replaced = type(name, (ours,), {"__init__": init, "__module__": "torch.nn.modules.rnn"})
        for place in (torch.nn, torch.nn.modules, torch.nn.modules.rnn):
            setattr(place, name, replaced)


def recurrent_tests(file: Path):
    """Yield the tests of a file whose own source names a recurrent module."""
    spec = importlib.util.spec_from_file_location("test_nn", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["test_nn"] = module
    spec.loader.exec_module(module)
    for suite in unittest.defaultTestLoader.loadTestsFromModule(module):
        for test in suite:
            method = inspect.unwrap(getattr(test, test._testMethodName))
            try:
                source = inspect.getsource(method)
            except (OSError, TypeError):
                source = ""
            if NAMES.search(source) or TITLES.search(method.__name__):
                yield test


def error(text: str) -> str:
    """Return the line of a traceback that has the exception."""
    return next(
        (line for line in text.splitlines()[1:] if re.match(r"[\w.]*(Error|Exception|Failure)\b", line)),
        text.splitlines()[-1],
    )


def outcomes(file: Path, variant: str | None) -> dict[str, str]:
    """Run the tests in this process; return each one's "passed", "skipped" or its error's last line."""
    if variant is not None:
        put_in_place(variant)
    found = {}
    for test in recurrent_tests(file):
        result = unittest.TestResult()
        test.run(result)
        wrong = [text for _, text in result.failures + result.errors]
        name = f"{type(test).__name__}.{test._testMethodName}"
        found[name] = error(wrong[0]) if wrong else "skipped" if result.skipped else "passed"
    return found


def outcomes_elsewhere(file: Path, variant: str | None) -> dict[str, str]:
    program = (
        "import json, sys; from pathlib import Path\n"
        f"from {__spec__.name} import outcomes\n"
        f"found = outcomes(Path({str(file)!r}), {variant!r})\n"
        "print(chr(10) + json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the tests of {variant or 'torch.nn'} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="test/test_nn.py of PyTorch's sources")
    parser.add_argument("--variant", choices=PRESETS, nargs="+", default=list(PRESETS))
    options = parser.parse_args()
    if not options.file.is_file():
        parser.error(f"file: expected PyTorch's test/test_nn.py, got {options.file}, which is no file")
    theirs = outcomes_elsewhere(options.file, None)
    passing = [name for name, outcome in theirs.items() if outcome == "passed"]
    print(f"{'torch.nn':<20} {len(passing)} passed of {len(theirs)}")
    worse = 0
    for variant in options.variant:
        ours = outcomes_elsewhere(options.file, variant)
        failed = [name for name in passing if ours.get(name) != "passed"]
        print(f"{variant:<20} {len(passing) - len(failed)} passed of these {len(passing)}")
        for name in failed:
            reason = next((why for test, why in OF_THE_FORMULA.items() if test in name), None)
            if variant == "none" or reason is None:
                worse += 1
                reason = ours.get(name)
            print(f"    {name}: {reason}")
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())

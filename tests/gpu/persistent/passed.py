"""Tell whether the persistent kernels' tests have passed with these files: they are frozen, and take a
minute.

``make persistent`` runs them, and then ``python -m tests.gpu.persistent.passed`` notes the files that passed;
where a file has changed since, every run of the tests includes them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[3]
#: What the kernels are, what tests them, and the description that they read.
FOLDERS = ("src/layernorm/gpu/persistent", "tests/gpu/persistent")
FILES = ("src/layernorm/spec.py", "src/layernorm/variants.py")
NOTE = Path(__file__).with_name("passed.sha256")


def digest() -> str:
    """Return the digest of all files."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths = [
        path for path in inside if path not in (NOTE, Path(__file__)) and "__pycache__" not in path.parts
    ]
    total = hashlib.sha256()
    for path in sorted((*paths, *(ROOT / name for name in FILES))):
        total.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def have_passed() -> bool:
    """Return whether the tests have passed with the files as they are."""
    return NOTE.is_file() and NOTE.read_text("ascii").strip() == digest()


if __name__ == "__main__":
    NOTE.write_text(digest() + "\n", "ascii")

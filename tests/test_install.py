"""Wheels with and without compiled kernels, built in the current environment without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from layernorm import ops

ROOT = Path(__file__).parents[1]
pytest.importorskip("scikit_build_core", reason="the build backend is in the extra dev")


def build(folder: Path, build_folder: str = "", **environment: str) -> tuple[int, str, list[str]]:
    """Build a wheel in ``folder``; return the exit code, the output, and the names of the wheel's files."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    command += ["-w", str(folder), "-C", f"build-dir={build_folder or folder / 'build'}", str(ROOT)]
    env = {k: v for k, v in os.environ.items() if k != "LAYERNORM_NATIVE"} | environment
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    names = [name for wheel in folder.glob("*.whl") for name in zipfile.ZipFile(wheel).namelist()]
    return result.returncode, " ".join((result.stdout + result.stderr).split()), names


def is_pure(folder: Path, names: list[str]) -> bool:
    tags = [path.name.split("-", 2)[2] for path in folder.glob("*.whl")]
    return tags == ["py3-none-any.whl"] and not any("_native" in name for name in names)


def test_a_wheel_without_a_compiler(tmp_path):
    code, printed, names = build(tmp_path, CXX="/nonexistent/c++")
    assert code == 0, printed
    assert "the compiled kernels cannot be built: no C++ compiler was found" in printed
    assert "layernorm: installed WITHOUT compiled kernels" in printed
    assert "layernorm/__init__.py" in names
    assert "layernorm/py.typed" in names
    assert "layernorm/experiments/report/report.html.j2" in names
    assert {"layernorm/gpu/persistent/forward.cu", "layernorm/gpu/persistent/device.cuh"} <= set(names)
    assert is_pure(tmp_path, names)


def test_a_pure_wheel_on_request(tmp_path):
    code, printed, names = build(tmp_path, LAYERNORM_NATIVE="0")
    assert code == 0, printed
    assert is_pure(tmp_path, names)


def test_required_kernels_that_cannot_be_built_are_an_error(tmp_path):
    code, printed, names = build(tmp_path, LAYERNORM_NATIVE="1", CXX="/nonexistent/c++")
    assert code != 0
    assert "the compiled kernels cannot be built: no C++ compiler was found" in printed
    assert names == []


@pytest.mark.usefixtures("native")
def test_a_wheel_with_compiled_kernels_works_elsewhere(tmp_path):
    # What `make install` has compiled is not compiled again.
    code, printed, names = build(tmp_path, "build/{wheel_tag}", LAYERNORM_NATIVE="1")
    assert code == 0, printed
    assert [name for name in names if "_native" in name] == ["layernorm/_native.abi3.so"]
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = """
import layernorm, torch
print(layernorm.__file__, layernorm.ops.NATIVE_PROBLEM, layernorm.LayerNorm(2)(torch.ones(2)).sum().item())
"""
    # -S and the path alone: the editable installation of this checkout must not be found.
    site = next(p for p in sys.path if p.endswith("site-packages"))
    run = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{site}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [str(tmp_path / "site/layernorm/__init__.py"), "None", "0.0"]


def test_this_installation_has_what_it_was_asked_for():
    if os.environ.get("LAYERNORM_NATIVE") != "1":
        pytest.skip("LAYERNORM_NATIVE=1 is not set")
    assert ops.NATIVE_PROBLEM is None

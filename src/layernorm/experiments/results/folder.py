"""The folder of an experiment: its ``config.json``, and that it holds nothing of another one."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

import layernorm
from layernorm import machine
from layernorm.experiments.errors import DamagedFile, ExperimentError, reason
from layernorm.experiments.run.training import FORMAT
from layernorm.experiments.storage import files, locks

CONFIG: Final = "config.json"
_CHANGED: Final = "its content does not have its SHA-256"


@contextmanager
def opened(folder: Path) -> Iterator[None]:
    """Make a folder, keep other commands out of it within the block, and clear what dead ones left.

    Raises:
        ExperimentError: it cannot be written to, or another command is in it.
    """
    try:
        files.make_folder(folder)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ExperimentError(f"--out: cannot write into {folder}: {reason(error)}") from error
    with locks.held(folder):
        files.remove_leftovers(folder)
        yield


def check(folder: Path, settings: Mapping[str, Any], fixed: Sequence[str]) -> str | None:
    """Check that a folder holds nothing made with other settings.

    A ``config.json`` that is empty, torn or changed is no obstacle: it is written anew, and every file of the
    folder says by itself what it is of.

    Args:
        folder: of the experiment.
        settings: of the experiment, as ``config.json`` has them.
        fixed: the settings that must be those of what is already there.

    Returns:
        How ``config.json`` is damaged, None if it is not.

    Raises:
        ExperimentError: it holds something else.
    """
    if not (folder / CONFIG).exists():
        return None
    try:
        before, whole = _parsed(folder, "--out: ")
    except DamagedFile as error:
        return str(error)
    # What JSON makes of the settings is what was written.
    asked = json.loads(json.dumps(settings))
    for name in fixed:
        if before.get(name) != asked[name]:
            what = name.replace("_", " ")
            raise ExperimentError(
                f"--out: {folder} holds an experiment with {what} {before.get(name)}, and "
                f"{asked[name]} is asked for; choose another --out"
                + ("" if whole else f" (but {CONFIG} is not as it was written: if that is wrong, delete it)")
            )
    return None if whole else f"--out: {folder / CONFIG} is damaged: {_CHANGED}"


def read(folder: Path, option: str = "") -> dict[str, Any]:
    """Return the ``config.json`` of a folder.

    Raises:
        DamagedFile: it is damaged.
        ExperimentError: it is not there, or of another version.
    """
    try:
        config, whole = _parsed(folder, option)
        if not whole:
            raise DamagedFile(f"{option}{folder / CONFIG} is damaged: {_CHANGED}")
    except DamagedFile as error:
        raise DamagedFile(
            f"{error}; give the command that made this folder again, which writes it anew"
        ) from error
    return config


def write(folder: Path, settings: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Write ``config.json``: the settings, versions, the machine, the date; return it."""
    config = {
        "format": FORMAT,
        **settings,
        "command": command,
        "versions": {
            "layernorm": layernorm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: metadata.version(name) for name in ("numpy", "scikit-learn")},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": machine.processor(),
            "threads": torch.get_num_threads(),
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    return files.write_json(folder / CONFIG, config)


def _parsed(folder: Path, option: str) -> tuple[dict[str, Any], bool]:
    """Return the ``config.json`` of a folder, of this version, and whether it is as it was written."""
    path = folder / CONFIG
    try:
        config, whole = files.read_json(path)
    except FileNotFoundError as error:
        raise ExperimentError(f"{option}{folder} holds no experiment: it has no {CONFIG}") from error
    except OSError as error:
        raise ExperimentError(f"{option}cannot read {path}: {reason(error)}") from error
    except ValueError as error:
        raise DamagedFile(f"{option}{path} is damaged: {reason(error)}") from error
    if config.get("format") != FORMAT:
        versions = config.get("versions")
        version = versions.get("layernorm", "unknown") if isinstance(versions, dict) else "unknown"
        raise ExperimentError(
            f"{option}{folder} was made by another version of layernorm ({version}, layout "
            f"{config.get('format', 1)}; this one writes {FORMAT}); choose another folder"
            + ("" if whole else f", or delete its {CONFIG} if that is damaged")
        )
    return config, whole

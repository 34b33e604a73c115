"""The folder of an experiment: its ``config.json``, and that it holds nothing of another one."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

import layernorm
from layernorm import machine
from layernorm.experiments.files import replacing
from layernorm.experiments.task import ExperimentError
from layernorm.experiments.training import FORMAT

CONFIG: Final = "config.json"


def prepare(folder: Path, settings: Mapping[str, Any], fixed: Sequence[str]) -> None:
    """Makes a folder and sees that it holds nothing made with other settings.

    Args:
        folder: of the experiment.
        settings: of the experiment, as ``config.json`` has them.
        fixed: the settings that must be those of what is already there.

    Raises:
        ExperimentError: it cannot be written to, or holds something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ExperimentError(f"--out: cannot write into {folder}: {error.strerror or error}") from error
    if not (folder / CONFIG).is_file():
        return
    before = read(folder, "--out: ")
    # What JSON makes of the settings is what was written.
    asked = json.loads(json.dumps(settings))
    for name in fixed:
        if before.get(name) != asked[name]:
            what = name.replace("_", " ")
            raise ExperimentError(
                f"--out: {folder} holds an experiment with {what} {before.get(name)}, and "
                f"{asked[name]} is asked for; choose another --out"
            )


def read(folder: Path, option: str = "") -> dict[str, Any]:
    """The ``config.json`` of a folder.

    Raises:
        ExperimentError: it is not there, damaged, or of another version.
    """
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except FileNotFoundError as error:
        raise ExperimentError(f"{option}{folder} holds no experiment: it has no {CONFIG}") from error
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{option}{path} is damaged: {error}; choose another folder") from error
    if config.get("format") != FORMAT:
        version = config.get("versions", {}).get("layernorm", "unknown")
        raise ExperimentError(
            f"{option}{folder} was made by another version of layernorm ({version}, layout "
            f"{config.get('format', 1)}; this one writes {FORMAT}); choose another folder"
        )
    return config


def write(folder: Path, settings: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Writes ``config.json``: the settings, versions, the machine, the date; returns it."""
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
    with replacing(folder / CONFIG) as fresh:
        fresh.write_text(json.dumps(config, indent=2) + "\n")
    return json.loads(json.dumps(config))  # type: ignore[no-any-return]

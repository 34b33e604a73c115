"""Fixtures of the tests of data: an empty cache, a folder of the user's, and a network in memory."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from layernorm.experiments.data import finding, sources


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch, tmp_path) -> None:
    """Leave an empty cache, no folder of the user's, no network."""

    def retrieve(address: str, *_: object, **__: object) -> str:
        raise OSError(f"no network: {address}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LAYERNORM_DATA", raising=False)
    monkeypatch.setattr(finding.pooch, "retrieve", retrieve)


@pytest.fixture
def named(monkeypatch, tmp_path) -> Path:
    """Return the user's folder."""
    folder = tmp_path / "named"
    folder.mkdir()
    monkeypatch.setenv("LAYERNORM_DATA", str(folder))
    return folder


@pytest.fixture
def stand_in(monkeypatch) -> Callable[[str, Mapping[str, bytes]], None]:
    """Register the checksums of small contents, in normal form, in the place of a source's own."""

    def register(constant: str, contents: Mapping[str, bytes]) -> None:
        source = getattr(sources, constant)
        files = [
            dataclasses.replace(file, sha256=hashlib.sha256(contents[file.name]).hexdigest())
            for file in source.files
            if file.name in contents
        ]
        assert len(files) == len(contents)
        monkeypatch.setattr(sources, constant, dataclasses.replace(source, files=tuple(files)))

    return register


@pytest.fixture
def network(monkeypatch) -> tuple[dict[str, bytes], list[str]]:
    """Return the content of each address, to be filled in by a test, and the addresses asked for."""
    given: dict[str, bytes] = {}
    asked: list[str] = []

    def retrieve(address: str, known_hash: None, name: str, folder: Path, downloader: Callable) -> str:
        asked.append(address)
        assert {"total", "update", "reset", "close"} <= set(dir(downloader.progressbar))
        if address not in given:
            raise OSError("no such page")
        downloader.progressbar.total = len(given[address])
        downloader.progressbar.update(1)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(given[address])
        return str(folder / name)

    monkeypatch.setattr(finding.pooch, "retrieve", retrieve)
    return given, asked

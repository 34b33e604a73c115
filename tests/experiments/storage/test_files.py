"""Files that are whole, flushed and verified; folders and runs that one process writes at a time."""

from __future__ import annotations

import errno
import multiprocessing
import os
import socket
import stat
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from layernorm.experiments.errors import ExperimentError
from layernorm.experiments.storage import files, locks


class Killed(BaseException):
    """The process ends here."""


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_folder_after(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def counted(*arguments, name=name, original=original):
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
            calls.append("folder" if is_folder else name)
            return original(*arguments)

        monkeypatch.setattr(os, name, counted)
    files.write(tmp_path / "a", b"whole")
    assert calls == ["fsync", "replace", "folder"]
    calls.clear()
    files.make_folder(tmp_path / "b" / "c")
    assert calls == ["folder", "folder"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a"
    with files.replacing(path) as first, files.replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
    errors, barrier = [], threading.Barrier(4)

    def write(letter: bytes) -> None:
        barrier.wait()
        for _ in range(30):
            try:
                files.write(path, letter * 5000)
                assert len(set(path.read_bytes())) == 1
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, where):
    path = tmp_path / "a"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match="No space left on device") as error:
        files.write(path, b"new")
    assert error.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_dead_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.checkpoint.new").write_text("half")
    with files.replacing(tmp_path / "b") as fresh:
        files.remove_leftovers(tmp_path)
        assert fresh.exists() or sys.platform == "win32"
        assert not list((tmp_path / "runs").iterdir())
        fresh.write_text("b")
    assert (tmp_path / "b").read_text() == "b"


@pytest.mark.parametrize("before", [None, "old\n"])
def test_a_table_agrees_with_its_checksum_whenever_its_writer_dies(tmp_path, monkeypatch, before):
    path, original = tmp_path / "a.csv", os.replace
    for deadline in range(4):
        if before is not None:
            files.write_table(path, before, "about")
        left = [deadline]

        def replace(*arguments, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with suppress(Killed):
                files.write_table(path, "new\n", "about")
        if path.exists():
            assert files.read_table(path, "about") == ("new\n" if deadline > 1 else before)
        else:
            assert deadline < 2


def test_every_damage_of_a_table_is_found(tmp_path):
    path = tmp_path / "a.csv"
    files.write_table(path, "x,y\n1,2\n3,4\n", "one line\nof what")
    assert files.read_table(path, "one line of what") == "x,y\n1,2\n3,4\n"
    with pytest.raises(files.OtherTableError, match="it is of one line of what"):
        files.read_table(path, "else")
    for file, at in ((f, at) for f in (path, files.checksum(path)) for at in range(f.stat().st_size)):
        content = file.read_bytes()
        for damaged in (content[:at], content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]):
            file.write_bytes(damaged)
            try:
                # What does not matter to the table may be another one: the end of the checksum's last line.
                assert files.read_table(path, "one line of what") == "x,y\n1,2\n3,4\n"
                assert file != path
            except ValueError:
                pass
        file.write_bytes(content)
    files.checksum(path).unlink()
    with pytest.raises(files.UnknownTableError, match=r"it has no a\.csv\.sha256 beside it"):
        files.read_table(path)


def test_a_table_that_is_damaged_is_not_taken_for_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    files.write_table(path, "old\n", "about")
    path.write_text("odd\n")

    def replace(source: Path, target: Path, original=os.replace) -> None:
        if target == path:
            raise Killed
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        files.write_table(path, "new\n", "about")
    with pytest.raises(ValueError, match="does not have its SHA-256"):
        files.read_table(path)


def test_json_knows_whether_it_is_as_it_was_written(tmp_path):
    path = tmp_path / "a.json"
    content = files.write_json(path, {"a": (1, 2.5), "b": "\udcff", "c": None})
    assert content == {"a": [1, 2.5], "b": "\udcff", "c": None}
    assert files.read_json(path) == (content, True)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found, agrees = files.read_json(path)
        except ValueError:
            continue
        assert not agrees or found == content
    for hostile in (b"[" * 100_000, b"[]", b"\xff", b""):
        path.write_bytes(hostile)
        with pytest.raises(ValueError):  # noqa: PT011 - whatever the parser says
            files.read_json(path)


def test_a_seal_finds_every_damage():
    whole = files.sealed(b"content")
    assert files.unsealed(whole) == b"content"
    for at in range(len(whole)):
        damaged = whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :]
        with suppress(ValueError):
            assert files.unsealed(damaged) is None
        assert files.unsealed(whole[:at]) is None


def _hold(folder: Path, held: multiprocessing.synchronize.Event) -> None:
    with locks.held(folder):
        held.set()
        threading.Event().wait()


def test_a_folder_is_one_process_s_until_that_dies(tmp_path):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held))
    process.start()
    assert held.wait(60)
    with pytest.raises(ExperimentError) as error, locks.held(tmp_path):
        pass
    told = str(error.value)
    assert told.startswith(
        f"{tmp_path} is in use by process {process.pid} on {socket.gethostname()} since 20"
    )
    assert f"if its machine is lost for good, delete {tmp_path / '.lock'}" in told
    process.kill()
    process.join()
    assert (tmp_path / ".lock").exists()
    own = pytest.raises(ExperimentError, match=f"process {os.getpid()} on")
    with locks.held(tmp_path), own, locks.held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_deleted_is_anothers(tmp_path):
    with locks.held(tmp_path):
        (tmp_path / ".lock").unlink()
        with locks.held(tmp_path):
            pass
        with locks.held(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_storage_without_locks_can_be_used(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locks.held(tmp_path):
        files.write(tmp_path / "a", b"a")


def test_the_newest_claim_counts(tmp_path):
    path = tmp_path / "none-batch4-seed0.claim"
    with locks.claimed(path) as first:
        first()
        with locks.claimed(path) as second:
            second()
            with pytest.raises(
                ExperimentError, match=r"process .* trains none-batch4-seed0 now; this process stops"
            ):
                first()
        assert not path.exists()
        with pytest.raises(ExperimentError, match="another command trains"):
            first()
    with locks.claimed(path):
        pass
    assert not path.exists()

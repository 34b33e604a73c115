"""The tasks and studies by name: this package's own, and tasks of other packages.

A task of this package is a module or a folder in ``tasks/`` that defines ``TASK``, and a line in ``TASKS``;
a study is one in ``studies/`` that defines ``STUDY``, and a name in ``STUDIES``. Another package adds a task
by an entry point of the group ``layernorm.tasks`` whose object is a ``Task`` of that name::

    [project.entry-points."layernorm.tasks"]
    my-task = "my_package.my_module:TASK"

A name of this package's own cannot be taken by another. Nothing is imported before it is asked for by name.

A task may also be in a file, ``path/to/file.py:TASK``, or in a module, ``package.module:TASK``; after a file
``:TASK`` may be left out. ``given`` adds a task that a program has made.
"""

from __future__ import annotations

import functools
import importlib
import runpy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Final

from layernorm.experiments.errors import ExperimentError, reason

if TYPE_CHECKING:
    from layernorm.experiments.task import Study, Task

#: The group of entry points.
GROUP: Final = "layernorm.tasks"
#: The tasks of this package, in the order of the paper's report, each with a line of help.
TASKS: Final[Mapping[str, str]] = {
    "digits": "scikit-learn's handwritten digits by a feed-forward network",
    "digits-rows": "the same read row by row by an LSTM",
    "order-embeddings": "order embeddings of images and captions (§6.1)",
    "attentive-reader": "cloze questions about a passage (§6.2)",
    "skip-thoughts": "sentence vectors (§6.3)",
    "draw": "DRAW on binarized MNIST (§6.4)",
    "handwriting": "handwriting generation (§6.5)",
    "mnist": "permutation-invariant MNIST, 784-1000-1000-10 (§6.6)",
    "convnet": "a convolutional network on MNIST or CIFAR-10 (§6.7)",
    "sequential-mnist": "MNIST pixel by pixel (Cooijmans et al.)",
    "permuted-mnist": "the same in a fixed random order",
    "transformer": "a transformer on characters: norms in various places, and none",
}
#: Those that are not of the paper's report, and run when they are named.
NAMED_ONLY: Final = ("transformer",)
#: The studies of this package, each a command.
STUDIES: Final = ("explain", "theory", "dynamics", "online")


_given: Final[dict[str, Task]] = {}


@contextmanager
def given(task: Task) -> Iterator[None]:
    """Let a task of the running program be found by its name within the block."""
    before = _given.get(task.name)
    _given[task.name] = task
    try:
        yield
    finally:
        _given.pop(task.name)
        if before is not None:
            _given[task.name] = before


def find(name: str) -> Task:
    """Return the task of this name.

    Raises:
        ExperimentError: there is none, or another package's cannot be loaded.
    """
    if name in _given:
        return _given[name]
    if name in TASKS:
        task: Task = importlib.import_module(_module("tasks", name)).TASK
        return task
    found = _of_others(name)
    if not found and (":" in name or name.endswith(".py")):
        return _from_place(name)
    if not found:
        raise ExperimentError(
            f"unknown task {name!r}; expected one of {', '.join(names())}, a file, my_task.py, or a module, "
            "my_package.my_module:TASK"
        )
    if len(found) > 1:
        packages = ", ".join(map(_package, found))
        raise ExperimentError(f"the task {name!r} is in several packages, {packages}; keep one of them")
    return _loaded(found[0])


def find_study(name: str) -> Study:
    """Return the study of this name.

    Raises:
        ExperimentError: there is none.
    """
    if name not in STUDIES:
        raise ExperimentError(f"unknown study {name!r}; expected one of {', '.join(STUDIES)}")
    study: Study = importlib.import_module(_module("studies", name)).STUDY
    return study


def names() -> tuple[str, ...]:
    """Return the names of all tasks, this package's own first."""
    others = {entry.name for entry in entry_points(group=GROUP)} - TASKS.keys()
    return (*TASKS, *sorted(others))


def _of_others(name: str) -> list[EntryPoint]:
    """Return the entry points of a name, each once."""
    found = {(entry.value, _package(entry)): entry for entry in entry_points(group=GROUP, name=name)}
    return list(found.values())


def _loaded(entry: EntryPoint) -> Task:
    from layernorm.experiments.task import Task

    where = f"the task {entry.name!r} of {_package(entry)} ({entry.value})"
    try:
        task = entry.load()
    except Exception as error:  # whatever another package's module raises when it is imported
        raise ExperimentError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(task, Task):
        raise ExperimentError(f"{where} must be a layernorm.experiments.task.Task, got {type(task).__name__}")
    if task.name != entry.name:
        raise ExperimentError(f"{where} calls itself {task.name!r}; both names must be the same")
    return task


def place_of(name: str) -> str:
    """Return the name under which a task is found from any folder: of a file its whole path."""
    path, attribute = _parts(name)
    return f"{Path(path).resolve()}:{attribute}" if path.endswith(".py") else name


def _parts(name: str) -> tuple[str, str]:
    """Return file or module, and the name in it."""
    if name.endswith(".py"):
        return name, "TASK"
    path, _, attribute = name.rpartition(":")
    return path, attribute


@functools.cache
def _from_place(name: str) -> Task:
    """Return the task of a file or a module."""
    from layernorm.experiments.task import Task

    path, attribute = _parts(name)
    try:
        if path.endswith(".py"):
            if not Path(path).is_file():
                raise ExperimentError(f"there is no file {path}")
            sys.path.insert(0, str(Path(path).resolve().parent))  # as Python does for a script
            try:
                found = runpy.run_path(path)
            finally:
                sys.path.pop(0)
            task = found.get(attribute)
            there = attribute in found
        else:
            module = importlib.import_module(path)
            task, there = getattr(module, attribute, None), hasattr(module, attribute)
    except ExperimentError:
        raise
    except Exception as error:  # whatever the file raises
        raise ExperimentError(f"{path} cannot be loaded: {type(error).__name__}: {reason(error)}") from error
    if not there:
        raise ExperimentError(f"{path} has no {attribute}; it should say {attribute} = layernorm.task(…)")
    if not isinstance(task, Task):
        raise ExperimentError(f"{name} must be what layernorm.task(…) returns, got {type(task).__name__}")
    return task


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown package"


def _module(room: str, name: str) -> str:
    return f"layernorm.experiments.{room}.{name.replace('-', '_')}"

"""The errors of the experiments, each a message of one line that says what to do."""

from __future__ import annotations


class ExperimentError(Exception):
    """Something that the person at the keyboard can mend; the message is one line that says how.

    Attributes:
        code: with which a command ends that fails so.
    """

    code = 2


class MissingData(ExperimentError):
    """A data set is not here and cannot be downloaded; the message says what, whose, where from, where to."""


class NothingRun(ExperimentError):
    """None of the experiments that were asked for could be run."""

    code = 1


class DamagedFile(ExperimentError):
    """A file of an experiment is torn, empty or changed, and can be made again; the message names it."""


def reason(error: BaseException) -> str:
    r"""Return what an exception says, in one line, or its type where it says nothing.

    Examples:
        >>> from layernorm.experiments.errors import reason
        >>> reason(ValueError("not so\nat all")), reason(EOFError())
        ('not so', 'EOFError')
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__

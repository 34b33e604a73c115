"""Say what a GPU's figures mean for ``layernorm.gpu.settings``: `python -m tools.gpu_settings DIR`.

DIR has what `make gpu` leaves there: the tables of `python -m benchmarks gpu`, the lines of
`python -m benchmarks first_contact`, and in `sanitizers` what NVIDIA's checkers said. Printed are the lines
to paste into the settings, and whether the persistent kernels stay (docs/gpu_recurrent.md has that rule).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

OURS: Final = "layernorm"
LOOPED: Final = "layernorm-looped"
PERSISTENT: Final = "layernorm-persistent"
#: Bytes of input from which on a norm must be at least as fast as PyTorch's at every point.
LEAST_BYTES: Final = 8 * 2**20
#: What a kernel may take of the time of those that serve without it, and dependent launches of usual ones'.
MOST: Final = {LOOPED: 1.0, PERSISTENT: 0.95}
MOST_DEPENDENT: Final = 0.97
#: The batches at which the recurrent kernels are compared, and the sizes that decide.
BATCHES: Final = (16, 64)
DECIDING: Final = (256, 512)
#: Triton's time relative to the persistent kernel's that keeps it, its time of training relative to Triton's
#: that keeps its backward, and nanoseconds of an exchange that are worth another protocol.
FORWARD_GAIN: Final = 1.5
TRAINING_SHARE: Final = 0.75
EXCHANGE_GAIN: Final = 200.0
_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_NORM_MODES: Final = {"forward", "training"}
Row = Mapping[str, str]


def faster(rows: Iterable[Row]) -> dict[tuple[str, str], int]:
    """Return the norms that are as fast as PyTorch's, each with the bytes of a row from which on.

    They are the bytes of the narrowest measured row from which on the norm is at least as fast in forward and
    training, at each measured input of 8 MiB and more: smaller ones are bound by the launch, and a row's
    kernel must not depend on how many rows come with it.
    """
    shapes: dict[tuple[str, str], dict[tuple[int, int], dict[str, float]]] = {}
    for row in rows:
        if row["peer"] == OURS:
            of_norm = shapes.setdefault((row["operator"], row["dtype"]), {})
            ratio = float(row["ratio_to_torch"] or 0)
            of_norm.setdefault((int(row["rows"]), int(row["width"])), {})[row["mode"]] = ratio
    found = {}
    for (operator, dtype), ratios in shapes.items():
        large = {
            shape: of_mode.keys() == _NORM_MODES and min(of_mode.values()) >= 1.0
            for shape, of_mode in ratios.items()
            if shape[0] * shape[1] * _BYTES[dtype] >= LEAST_BYTES
        }
        slow = max((width for (_, width), is_fast in large.items() if not is_fast), default=0)
        fast = [width for _, width in large if width > slow]
        if fast:
            found[operator, dtype] = min(fast) * _BYTES[dtype]
    return found


def served(rows: Iterable[Row], kernel: str, *, spoke: bool = False) -> dict[str, tuple[int, int]]:
    """Return the hidden sizes up to which a kernel is worth it, forward and backward, by cell.

    It is, at a size, if it takes at most ``MOST`` of the others' time in bfloat16 at both batches, of forward
    in inference and in training, or of backward. The others are the steps' own launches, and for the
    persistent kernel the looped one where there is one.

    Args:
        rows: of the recurrent layers' table.
        kernel: ``LOOPED`` or ``PERSISTENT``.
        spoke: whether a checker found fault with the kernel; then it is worth it nowhere.
    """
    times = _times(rows)
    found = {}
    for cell in dict.fromkeys(cell for cell, *_ in times):
        hidden = sorted({size for other, size, *_ in times if other == cell})
        sizes = [0, 0]
        for index, parts in enumerate((("inference", "forward"), ("backward",))):
            for size in hidden:
                points = [(cell, size, batch, part) for batch in BATCHES for part in parts]
                if spoke or not all(_is_worth(times.get(point, {}), kernel) for point in points):
                    break
                sizes[index] = size
        found["rnn_tanh" if cell == "rnn" else cell] = (sizes[0], sizes[1])
    return found


def _times(rows: Iterable[Row]) -> dict[tuple[str, int, int, str], dict[str, float]]:
    """Return microseconds by cell, hidden size, batch and part, and then by peer."""
    found: dict[tuple[str, int, int, str], dict[str, float]] = {}
    for row in rows:
        if row["dtype"] != "bfloat16" or row["peer"] not in (OURS, *MOST):
            continue
        point = row["cell"], int(row["hidden"]), int(row["batch"])
        of_peer = {"inference": float(row["median_us"] or "nan")}
        if row["mode"] == "training":
            forward = float(row["forward_us"] or "nan")
            of_peer = {"forward": forward, "backward": of_peer["inference"] - forward}
        for part, time in of_peer.items():
            found.setdefault((*point, part), {})[row["peer"]] = time
    return found


def _is_worth(times: Mapping[str, float], kernel: str) -> bool:
    """Return whether the kernel's time is short enough; a time that is missing is not."""
    others = (OURS,) if kernel == LOOPED else (OURS, LOOPED)
    known = [times[name] for name in others if not math.isnan(times.get(name, math.nan))]
    return OURS in times and kernel in times and times[kernel] <= MOST[kernel] * min(known, default=0.0)


def dependent(lines: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether the kernels of a step are to begin before those before them end.

    They are where their bits are the usual ones, each time, and inference and training take at most 0.97 of
    the usual launches' time, at each size that the first contact measured.
    """
    lines = list(lines)
    early, usual = (_of_stage(lines, f"{stage}:lstm:bfloat16") for stage in ("dependent", "triton"))
    points = [early[point] | {"usual": usual.get(point, {}).get("us", {})} for point in early]
    return bool(points) and all(
        point.get("dependent")
        and all(point.get("as_usual", [False]))
        and all(
            point.get("us", {}).get(mode, math.inf) <= MOST_DEPENDENT * point["usual"].get(mode, 0.0)
            for mode in ("inference", "training")
        )
        for point in points
    )


class Verdict(NamedTuple):
    """Say what becomes of the persistent kernels.

    Attributes:
        cells: those that stay.
        backward: whether backward stays.
        exchange: whether the exchange is worth another protocol.
        reason: by what rule.
    """

    cells: tuple[str, ...]
    backward: bool
    exchange: bool
    reason: str


_DELETED: Final = Verdict((), False, False, "")


def verdict(lines: Iterable[Mapping[str, Any]]) -> Verdict:
    """Return what becomes of the persistent kernels by the figures of the first contact.

    Raises:
        ValueError: cuDNN's or the Triton kernels' figures are missing.
    """
    lines = list(lines)
    points = [(hidden, batch) for hidden in DECIDING for batch in BATCHES]
    triton, kept = (_of_stage(lines, f"{kernel}:lstm:bfloat16") for kernel in ("triton", "persistent"))
    cudnn = _of_stage([line for line in lines if line.get("dtype") == "bfloat16"], "cudnn")
    missing = [
        f"{name} at hidden {hidden}, batch {batch}"
        for name, of in (("Triton", triton), ("cuDNN", cudnn))
        for hidden, batch in points
        if "us" not in of.get((hidden, batch), {})
    ]
    if missing:
        raise ValueError(f"first contact has no times of {', '.join(missing)}; run it again")

    def gains(mode: str) -> list[float]:
        return [triton[point]["us"][mode] / kept[point]["us"][mode] for point in points]

    if all(cudnn[point]["us"]["inference"] >= triton[point]["us"]["inference"] for point in points):
        return _DELETED._replace(reason="the Triton kernels take no longer than cuDNN in bfloat16")
    wrong = [point for point in points if not _is_right(kept.get(point, {}), triton[point], backward=False)]
    if wrong:
        return _DELETED._replace(reason=f"wrong, or not there, at (hidden, batch) {wrong}")
    least, share = min(gains("inference")), 1 / min(gains("training"))
    text = f"forward is {least:.2f} times as fast as Triton at least, training takes {share:.2f} of its time"
    if least < FORWARD_GAIN:
        return _DELETED._replace(reason=text)
    right = all(_is_right(kept[point], triton[point], backward=True) for point in points)
    exchange = _exchange_gain(lines) >= EXCHANGE_GAIN
    return Verdict(("lstm", "gru"), right and share <= TRAINING_SHARE, exchange, text)


def _of_stage(lines: Sequence[Mapping[str, Any]], stage: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the times, errors and sameness of bits of a stage, by hidden size and batch."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for line in lines:
        if line.get("stage") == stage and "hidden" in line and not line.get("rehearsal"):
            of = found.setdefault((line["hidden"], line["batch"]), {})
            names = {"us_a_step": "us", "off": "off", "same_bits": "same"}
            names |= {name: name for name in ("tier", "as_usual", "dependent")}
            of |= {name: line[key] for key, name in names.items() if key in line}
    return found


def _is_right(kept: Mapping[str, Any], triton: Mapping[str, Any], *, backward: bool) -> bool:
    """Return whether the persistent kernel ran, repeats its bits, and has at most twice Triton's error."""
    if "us" not in kept or kept["tier"][backward] != "persistent" or not all(kept["same"]):
        return False
    some = slice(1, None) if backward else slice(1)
    pairs = zip(kept["off"][some], triton["off"][some], strict=True)
    return all(a is not None and b is not None and a <= 2 * b for a, b in pairs)


def _exchange_gain(lines: Iterable[Mapping[str, Any]]) -> float:
    """Return the nanoseconds that st.async saves at least in clusters of 8 and 16, next to other stores."""
    times = {
        (line["blocks"], line["protocol"]): line["ns"]
        for line in lines
        if line.get("stage") == "exchange" and line.get("stores", 0) > 0 and "ns" in line
    }
    gains = [
        times[blocks, "release"] - times[blocks, "async"]
        for blocks in (8, 16)
        if {(blocks, "release"), (blocks, "async")} <= times.keys()
    ]
    return min(gains, default=0.0)


def speaks(text: str) -> bool:
    """Return whether a checker found fault, did not end, or saw a stage that computed nothing."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    return not found or any(int(count) > 0 for count in found) or '"off": ' not in text


def _table(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _architecture(rows: Sequence[Row]) -> tuple[int, int]:
    """Return the compute capability of the device that all rows are of."""
    found = {row["capability"] for row in rows if row["capability"]}
    if len(found) != 1:
        raise ValueError(f"expected a table of one device; its compute capabilities are {sorted(found)}")
    major, minor = found.pop().split(".")
    return int(major), int(minor)


def _where(rows: Sequence[Row]) -> str:
    """Return the device and the versions, in a comment."""
    names = ("gpu", "torch", "triton", "driver")
    found = (sorted({row[name] for row in rows if row["gpu"]}) for name in names)
    return "    # " + "; ".join(
        f"{name} {', '.join(values)}" for name, values in zip(names, found, strict=True)
    )


def _settings(name: str, rows: Sequence[Row], values: Mapping[Any, Any]) -> list[str]:
    return [f"{name} = {{", _where(rows), f"    {_architecture(rows)}: {dict(values)!r},", "}"]


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def report(folder: Path) -> list[str]:
    """Return the lines for a folder of results.

    Raises:
        ValueError: it has no results, or those of several devices.
    """
    norms, layers = _table(folder / "gpu.csv"), _table(folder / "gpu_recurrent.csv")
    logs = sorted((folder / "sanitizers").glob("*.txt"))
    loud = [path.name for path in logs if speaks(path.read_text(encoding="utf-8", errors="replace"))]
    contact = folder / "first_contact.jsonl"
    if not (norms or layers or contact.is_file()):
        raise ValueError(f"{folder} has no gpu.csv, gpu_recurrent.csv or first_contact.jsonl")
    found = [f"# checkers that found fault: {', '.join(loud) or 'none'}, of {len(logs)}"]
    if norms:
        found += _settings("FASTER", norms, faster(norms))
    if layers:
        found += _settings("LOOPED", layers, served(layers, LOOPED))
        found += _settings("PERSISTENT", layers, served(layers, PERSISTENT, spoke=bool(loud)))
    if contact.is_file():
        lines = [json.loads(line) for line in contact.read_text(encoding="utf-8").splitlines()]
        found.append(f"# DEPENDENT, the compute capability of the first contact: {_yes(dependent(lines))}")
        try:
            found.append(f"# {verdict(lines)}")
        except ValueError as error:
            found.append(f"# {error}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the settings."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_settings", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    try:
        print("\n".join(report(parser.parse_args(arguments).folder)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

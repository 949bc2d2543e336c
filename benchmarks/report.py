"""From the figures of several rounds to one report: median and spread, and ratios within each round. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Round: TypeAlias = dict[str, float]
"""One value for each figure, by its key."""


@dataclass(frozen=True)
class Figure:
    """What is measured. `peer` is the figure that it is a ratio of; `aim` is the least, or for times the most."""

    key: str
    title: str
    unit: str
    peer: str | None = None
    aim: float | None = None
    is_less_better: bool = False


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share (0-1) of the values lies, the nearest of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def summary(figures: Sequence[Figure], rounds: Sequence[Round]) -> dict[str, dict[str, float | str | bool | None]]:
    """For each figure its median, minimum and maximum, the median ratio to its peer, and whether the aim is met."""
    found: dict[str, dict[str, float | str | bool | None]] = {}
    for figure in figures:
        values = [each[figure.key] for each in rounds]
        median = statistics.median(values)
        ratio = None
        if figure.peer is not None:
            ratio = round(statistics.median(each[figure.key] / each[figure.peer] for each in rounds), 3)
        is_met = None
        if figure.aim is not None:
            is_met = median <= figure.aim if figure.is_less_better else median >= figure.aim
        found[figure.key] = {
            "title": figure.title,
            "unit": figure.unit,
            "median": round(median, 3),
            "min": round(min(values), 3),
            "max": round(max(values), 3),
            "peer": figure.peer,
            "ratio": ratio,
            "aim": figure.aim,
            "is_met": is_met,
        }
    return found


def markdown(found: dict[str, dict[str, float | str | bool | None]]) -> str:
    """The summary as a table."""
    lines = ["| figure | median | min to max | of its peer | aim |", "|---|---|---|---|---|"]
    for each in found.values():
        ratio = f"{each['ratio']} × {found[str(each['peer'])]['title']}" if each["ratio"] is not None else ""
        value, spread = f"{each['median']:g} {each['unit']}", f"{each['min']:g} to {each['max']:g}"
        aim = "" if each["aim"] is None else f"{each['aim']:g}, {'met' if each['is_met'] else 'MISSED'}"
        lines.append(f"| {each['title']} | {value} | {spread} | {ratio} | {aim} |")
    return "\n".join(lines)

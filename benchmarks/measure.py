"""CPU time of several blocks of work, in rounds: A B C, A B C, ..., so that whatever else the machine does hits all."""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import TypeAlias

Block: TypeAlias = Callable[[], Awaitable[int]]
"""Does some work, and returns how many pieces of it."""

Measure: TypeAlias = Callable[[], Awaitable[float]]
"""Has some work done, and returns the CPU seconds of one piece of it."""

Samples: TypeAlias = Mapping[str, Sequence[float]]
"""For each block: the CPU seconds of one piece, round by round."""


@dataclass(frozen=True)
class Figure:
    """The median of many rounds, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Return the figure of one value for each round."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)

    def scaled(self, factor: float) -> Figure:
        """Return the same in another unit."""
        return Figure(self.median * factor, self.low * factor, self.high * factor)


async def measure(block: Block) -> float:
    """Return the CPU seconds that this process takes for one piece of a block."""
    # Nobody pays for another's garbage; everybody pays for his own.
    gc.collect()
    start = time.process_time()
    pieces = await block()
    return (time.process_time() - start) / pieces


async def take_turns(blocks: Mapping[str, Block], rounds: int, label: str) -> Samples:
    """Measure each of `blocks` in this process, as `measure_in_turns` does."""
    # What is alive by now stays so: the collections that the blocks cause shall not look at it again and again.
    gc.collect()
    gc.freeze()
    try:
        return await measure_in_turns({name: partial(measure, block) for name, block in blocks.items()}, rounds, label)
    finally:
        gc.unfreeze()


async def measure_in_turns(measures: Mapping[str, Measure], rounds: int, label: str) -> Samples:
    """Call each of `measures` once in every one of `rounds`, after one round that only warms up.

    The order is another one in each round, and the same ones in each run: who comes after whom makes a difference.
    """
    samples: dict[str, list[float]] = {name: [] for name in measures}
    names = list(measures)
    dice = random.Random(0)
    try:
        for index in range(-1, rounds):
            show_progress(label, index + 1, rounds)
            dice.shuffle(names)
            for name in names:
                seconds = await measures[name]()
                if index >= 0:
                    samples[name].append(seconds)
    finally:
        end_progress()
    return samples


def ratios(samples: Samples, name: str, base: str) -> Figure:
    """Return what `name` costs as a share of what `base` costs in the same round."""
    return Figure.of([mine / other for mine, other in zip(samples[name], samples[base], strict=True)])


def differences(samples: Samples, name: str, base: str) -> Figure:
    """Return what `name` costs beyond what `base` costs in the same round."""
    return Figure.of([mine - other for mine, other in zip(samples[name], samples[base], strict=True)])


def show_progress(label: str, done: int, total: int) -> None:
    """Say on standard error how far it is."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{label}: {done}/{total}", end="", file=sys.stderr, flush=True)
    elif done == total:
        print(f"{label}: {total} rounds", file=sys.stderr, flush=True)


def end_progress() -> None:
    """Clear the line that `show_progress` wrote."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)

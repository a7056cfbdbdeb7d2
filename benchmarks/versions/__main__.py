"""The process that measures one version: ``python -m benchmarks.versions URL``, started by `compare`.

It says which pairs it has, and then measures those that it is asked for: a number on standard input, what both blocks
of that pair took on standard output, each on a line.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys

import ctxdb_core
from benchmarks.measure import Block
from benchmarks.pairs import open_pairs
from benchmarks.versions.meter import Meter, meter_of_process


async def main(url: str) -> None:
    """Measure what is asked for, until there is nothing left to read."""
    meter = meter_of_process()
    async with open_pairs(url) as pairs:
        names = [[pair.name, pair.is_share] for pair in pairs]
        _answer({"version": ctxdb_core.__file__, "pairs": names})
        # What is alive by now stays so: the collections that the blocks cause shall not look at it again and again.
        gc.collect()
        gc.freeze()
        turns = 0
        # The loop has nothing else to do while it is blocked here.
        while line := sys.stdin.readline():
            pair = pairs[int(line)]
            blocks = [pair.without, pair.by_ctxdb]
            # Who comes second has an easier time of it or a harder one: each does so every other time.
            order = (0, 1) if turns % 2 else (1, 0)
            turns += 1
            taken = [0.0, 0.0]
            for index in order:
                taken[index] = await _measure(blocks[index], meter)
            _answer(taken)


async def _measure(block: Block, meter: Meter) -> float:
    # Nobody pays for another's garbage; everybody pays for his own.
    gc.collect()
    meter.start()
    pieces = await block()
    return meter.stop() / pieces


def _answer(answer: object) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))

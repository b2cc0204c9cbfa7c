"""Thousands of adapters on one base. `python benchmarks/serve_many.py`

134M (30 x 576), bf16, adapters of rank 8, asked for by Zipf's law, 8 requests at a time of 128 tokens in and 24 out: tokens a
second with 2,000 registered beside 5; memory of one that is idle; registering the first and the last; a first use.
"""

import argparse
import gc
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import publish, roofline
from serve_shapes import ask, make_engine, make_folder, prompts

DISTINCT = 64  # adapter files of their own; the others are copies with one number changed


def make_many(folder: Path, count: int) -> None:
    """`count` adapters, no two alike, from a few templates."""
    make_folder(folder, "134M", DISTINCT)
    for number in range(DISTINCT, count):
        place = folder / f"a{number}"
        if place.is_dir():
            continue
        shutil.copytree(folder / f"a{number % DISTINCT}", place)
        with (place / "adapter_model.safetensors").open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write((0x3C003C003C003C00 + number).to_bytes(8, "little"))


def zipf(count: int, requests: int, seed: int) -> list[str | None]:
    rng = random.Random(seed)
    return [
        f"a{n}" for n in rng.choices(range(count), [1 / (n + 1) for n in range(count)], k=requests)
    ]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def throughput(engine: Any, count: int, requests: int, seed: int) -> float:
    """Generated tokens a second, a closed loop of 8 at a time."""
    names = zipf(count, requests, seed)
    texts = prompts(requests, 128, seed)
    start = time.perf_counter()
    ask(engine, texts, names, 24)
    return requests * 24 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "afina-serve-many"
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    make_many(options.folder, options.count)
    engines = {}
    seconds: list[float] = []
    for count in (5, options.count):
        engine = engines[count] = make_engine("134M", memory=1 << 30, max_num_seqs=8)
        for number in range(count):
            start = time.perf_counter()
            engine.registry.add(f"a{number}", options.folder / f"a{number}")
            seconds.append(time.perf_counter() - start)
    first, last = statistics.median(seconds[5:105]), statistics.median(seconds[-100:])

    # an idle one in memory: what is kept of it beside its numbers, over many that came and went
    many = engines[options.count]
    gc.collect()
    before = resident_bytes()
    extra = make_engine("134M", memory=64 << 20)
    gc.collect()
    base_bytes = resident_bytes() - before
    before = resident_bytes()
    for number in range(options.count):
        extra.registry.add(f"a{number}", options.folder / f"a{number}")
    gc.collect()
    idle_bytes = (resident_bytes() - before) / options.count
    del extra

    rates: dict[int, list[float]] = {count: [] for count in engines}
    for repeat in range(options.repeats + 1):
        for count, engine in engines.items():
            rate = throughput(engine, count, options.requests, repeat)
            if repeat:
                rates[count].append(rate)
                print(f"{count} adapters: {rate:.1f} tokens/s", flush=True)

    # first use of one never seen against one that is there
    cold, warm = [], []
    seen = set(many.memory.residents)
    fresh = [f"a{n}" for n in range(options.count) if many.registry.get(f"a{n}").hash not in seen][
        :12
    ]
    for number, name in enumerate(fresh):
        for kind in (cold, warm):
            (text,) = prompts(1, 16, 1000 + 2 * number + (kind is warm))
            start = time.perf_counter()
            ask(many, [text], [name], 1)
            kind.append(time.perf_counter() - start)
    figures = {
        "many_over_few": statistics.median(rates[options.count]) / statistics.median(rates[5]),
        "idle_overhead_bytes": idle_bytes,
        "register_last_over_first": last / first,
        "register_ms": 1000 * last,
        "cold_ms": 1000 * (statistics.median(cold) - statistics.median(warm)),
        "tokens_per_second": statistics.median(rates[options.count]),
        "loads": float(many.memory.loads),
    }
    targets = {
        "many_over_few": (">=", 0.95),
        "idle_overhead_bytes": ("<=", 1024),
        "register_last_over_first": ("<=", 1.2),
        "cold_ms": ("<=", 10.0),
    }
    for key, value in figures.items():
        print(f"{key:30} {value:10.3f}")
    publish(
        "serve_many",
        figures,
        targets,
        {"rates": rates, "cold": cold, "warm": warm, "base_bytes": base_bytes},
        roofline(),
    )


if __name__ == "__main__":
    main()

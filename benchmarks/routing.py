"""Does model="auto" take the adapter that a person would? Twenty kinds of queries, held-out wordings, and 1,000 adapters.

    python benchmarks/routing.py [--base FOLDER] [--seeds 5]        two minutes on two cores

The oracle knows of which kind each query is. Beside it: TF-IDF over letters, with the same queries in the same places.
"""

import argparse
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import publish, roofline
from skills import SKILLS, queries

from afina.data.renderer import Renderer
from afina.engine.adapter_router import AdapterRouter
from afina.engine.routing_profile import ChatFrame, build_profile
from afina.models.loading import EMBEDDED, load_base

SEEN, ASKED = 96, 24
FIRST_SEED = 10  # layers, shrinkage and threshold were chosen on the seeds 0 to 2
Asked = list[tuple[int, str]]  # (skill, query)


def asked(seed: int, kind: Any, n: int = ASKED, without: int | None = None) -> Asked:
    return [
        (k, q)
        for k, skill in enumerate(SKILLS)
        if k != without
        for q in queries(skill, seed, n, kind)
    ]


def tfidf(seen: Asked) -> Callable[[Asked], float]:
    """Right choices by the nearest seen query, by TF-IDF over words' pieces of 3 to 5 letters."""

    def pieces(text: str) -> Counter[str]:
        line = " ".join(["", *re.findall(r"\w+|[^\w\s]", text.lower()), ""])
        return Counter(line[i : i + n] for n in (3, 4, 5) for i in range(len(line) - n + 1))

    bags = [pieces(query) for _, query in seen]
    documents = Counter(piece for bag in bags for piece in bag)
    place = {piece: n for n, piece in enumerate(documents)}
    rarity = torch.tensor([math.log(len(seen) / (1 + n)) + 1 for n in documents.values()])

    def weigh(bags: Sequence[Counter[str]]) -> torch.Tensor:
        counts = torch.zeros(len(bags), len(place))
        for row, bag in zip(counts, bags, strict=True):
            known = [(place[piece], float(n)) for piece, n in bag.items() if piece in place]
            row[[n for n, _ in known]] = torch.tensor([count for _, count in known])
        return torch.nn.functional.normalize(counts * rarity, dim=-1)

    table, owners = weigh(bags), torch.tensor([k for k, _ in seen])

    def right(rows: Asked) -> float:
        nearest = owners[(weigh([pieces(query) for _, query in rows]) @ table.T).argmax(-1)]
        return float((nearest == torch.tensor([k for k, _ in rows])).float().mean())

    return right


def measure(
    choosing: AdapterRouter, tokens: Callable[[str], list[int]], seed: int
) -> dict[str, float]:
    """Shares of right choices for one way of keeping wordings and things back."""
    seen = asked(seed, "seen", SEEN)
    profiles = [
        build_profile(choosing.embedding, [tokens(q) for k, q in seen if k == n])
        for n in range(len(SKILLS))
    ]
    for skill, profile in zip(SKILLS, profiles, strict=True):
        choosing.add_profile(skill.name, profile)
    letters, figures = tfidf(seen), {}
    for kind in ("new wordings", "other words"):
        rows = asked(seed, kind)
        vectors = choosing.embedding([tokens(q) for _, q in rows])
        choices = [choosing.route(v) for v in vectors]
        name = kind.replace(" ", "_")
        figures[name] = statistics.mean(
            c.name == SKILLS[k].name for c, (k, _) in zip(choices, rows, strict=True)
        )
        figures[f"{name}_to_base"] = statistics.mean(c.name is None for c in choices)
        figures[f"{name}_tfidf"] = letters(rows)
    unknown = []
    for n, skill in enumerate(SKILLS):  # nobody for it: the base should answer
        choosing.remove_profile(skill.name)
        own = [tokens(q) for q in queries(skill, seed, ASKED, "new wordings")]
        unknown += [choosing.route(v).name is None for v in choosing.embedding(own)]
        choosing.add_profile(skill.name, profiles[n])
    figures["unknown_to_base"] = statistics.mean(unknown)
    return figures


def milliseconds(choosing: AdapterRouter, vector: torch.Tensor, adapters: int = 1000) -> float:
    """Median time of a choice among this many adapters, half of them resident, without embedding the query."""
    known = choosing.embedding([[10 + n for n in range(30)]])[0]
    draw = torch.Generator().manual_seed(0)
    for n in range(adapters):
        choosing.add_profile(
            f"adapter {n}", known + torch.randn(16, *known.shape, generator=draw) * known.std()
        )
    resident = {f"adapter {n}" for n in range(0, adapters, 2)}
    choosing.route(vector, resident)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        choosing.route(vector, resident)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def main(options: Sequence[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--base", default=EMBEDDED)
    arguments.add_argument("--seeds", type=int, default=5)
    told = arguments.parse_args(options)
    base = load_base(told.base, dtype="float32")
    renderer = Renderer(base.tokenizer, None, base.max_positions)
    frame = ChatFrame.of(renderer)

    def tokens(query: str) -> list[int]:
        return frame.question(renderer.prompt(query))

    repeats = []
    for seed in range(FIRST_SEED, FIRST_SEED + told.seeds):
        repeats.append(measure(AdapterRouter(base), tokens, seed))
        print(seed, {key: round(value, 3) for key, value in repeats[-1].items()}, flush=True)
    figures = {key: statistics.mean(row[key] for row in repeats) for key in repeats[0]}
    figures["new_wordings_worst"] = min(row["new_wordings"] for row in repeats)
    choosing = AdapterRouter(base)
    figures["ms_at_1000"] = milliseconds(
        choosing, choosing.embedding([tokens("What is the capital of Peru?")])[0]
    )
    for key, value in figures.items():
        print(f"{key:30} {value:8.3f}")
    if told.base == EMBEDDED:
        publish(
            "routing",
            figures,
            {"new_wordings": (">=", 0.95), "ms_at_1000": ("<=", 5.0)},
            {"seeds": repeats},
            roofline(),
        )


if __name__ == "__main__":
    main()

"""Switching to an activated adapter in a long conversation, beside switching to a LoRA. `python benchmarks/alora_switch.py`

134M (30 x 576), bf16. Time to the first token after a switch at histories of 256 to 8,000 tokens; and a chat of ten turns, 800
tokens in and 16 out, with a switch each turn. The same engine, the same ranks; LoRA's history has to be computed anew.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, publish, roofline
from serve_shapes import ask, make_engine, make_folder, prompts

INVOCATION = (101, 102, 103)
HISTORIES = (256, 512, 1024, 2048, 4096, 8000)


def switch(engine: Any, name: str, history: int, seed: int) -> float:
    """Seconds to the first token under `name`, after a history that the base has read."""
    (text,) = prompts(1, history, seed)
    ask(engine, [text], [None], 1)
    start = time.perf_counter()
    ask(engine, [(*text, *INVOCATION)], [name], 1)
    return time.perf_counter() - start


def chat(engine: Any, names: list[str], turns: int, seed: int) -> float:
    """Seconds of a conversation in which the base and adapters answer in turn."""
    pieces, history = prompts(turns, 800, seed), ()
    start = time.perf_counter()
    for turn, piece in enumerate(pieces):
        name = names[turn % len(names)]
        history = (*history, *piece, *INVOCATION)
        ((_, tokens, _),) = ask(engine, [history], [name], 16)
        history = (*history, *tokens)
    return time.perf_counter() - start


def picture(rows: dict[str, list[float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4))
    for name, label in (
        ("lora", "to a LoRA: all is computed anew"),
        ("alora", "to an activated LoRA: the history is reused"),
    ):
        axes.plot(
            HISTORIES[: len(rows[name])], [1000 * s for s in rows[name]], marker="o", label=label
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of history",
        ylabel="time to first token, ms",
        title="Switching to an adapter in a conversation (134M, bf16, 2 cores)",
    )
    axes.set_xticks(HISTORIES, [f"{n:,}" for n in HISTORIES])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "afina-serve-mixed" / "134M"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    make_folder(options.folder, "134M", 8)
    make_folder(options.folder / "activated", "134M", 8, alora_invocation_tokens=list(INVOCATION))
    engine = make_engine("134M", memory=3 << 30)
    for number in range(8):
        engine.registry.add(f"lora{number}", options.folder / f"a{number}")
        engine.registry.add(f"alora{number}", options.folder / "activated" / f"a{number}")
    seconds: dict[str, dict[int, list[float]]] = {
        kind: {n: [] for n in HISTORIES} for kind in ("alora", "lora")
    }
    seed = 0
    for repeat in range(options.repeats + 1):
        for history in HISTORIES if repeat else HISTORIES[:1]:
            for kind in seconds:
                seed += 1
                spent = switch(engine, f"{kind}{seed % 8}", history, seed)
                if repeat:
                    seconds[kind][history].append(spent)
                    print(f"{kind} at {history}: {1000 * spent:.1f} ms", flush=True)
    chats: dict[str, list[float]] = {"alora": [], "lora": []}
    for _ in range(max(1, options.repeats - 1)):
        for kind in chats:
            seed += 1
            chats[kind].append(chat(engine, [f"{kind}{n}" for n in range(8)], options.turns, seed))
            print(f"{kind} chat: {chats[kind][-1]:.2f} s", flush=True)
    medians = {kind: [statistics.median(seconds[kind][n]) for n in HISTORIES] for kind in seconds}
    at = HISTORIES.index(4096)
    figures = {
        "switch_ratio_4096": medians["lora"][at] / medians["alora"][at],
        "switch_ratio_8000": medians["lora"][-1] / medians["alora"][-1],
        "alora_first_token_ms_4096": 1000 * medians["alora"][at],
        "lora_first_token_ms_4096": 1000 * medians["lora"][at],
        "chat_ratio": statistics.median(chats["lora"]) / statistics.median(chats["alora"]),
    }
    RESULTS.mkdir(exist_ok=True)
    picture(medians, RESULTS / "alora_switch.png")
    targets = {"switch_ratio_4096": (">=", 30.0), "chat_ratio": (">=", 5.0)}
    publish("alora_switch", figures, targets, {"seconds": seconds, "chats": chats}, roofline())


if __name__ == "__main__":
    main()

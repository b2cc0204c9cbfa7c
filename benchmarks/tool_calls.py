"""Does a small chat model learn to call functions? `python benchmarks/tool_calls.py [--base FOLDER]`

SmolLM2-135M-Instruct, LoRA r8, on conversations of LLaMA-Factory's Glaive demo (shared/data/llamafactory-demo): each ends with its
first call, which alone is trained, under the template `chatml`, which describes the functions and writes calls as JSON. Of the
calls of held-out conversations, before and after: the share that parses, that names the right function, and that is the right
call with all its arguments. Greedy.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import SHARED, peak_mb, publish, roofline

EVAL_ROWS, STEPS, BATCH_TOKENS, RATE, LENGTH = 16, 24, 1024, 1e-3, 768
Rows = list[dict[str, Any]]


def first_calls() -> Rows:
    """Return the conversations up to their first call, which is the only trained answer."""
    file = SHARED / "data/llamafactory-demo/glaive_toolcall_en_demo.json"
    rows = []
    for row in json.loads(file.read_text(encoding="utf-8")):
        turns = [dict(turn) for turn in row["conversations"]]
        end = next((n for n, turn in enumerate(turns) if turn["from"] == "function_call"), None)
        if end is None:
            continue
        for turn in turns[:end]:
            if turn["from"] == "gpt":
                turn["weight"] = 0
        rows.append({"conversations": turns[: end + 1], "tools": row["tools"]})
    return rows


def call_of(text: str) -> dict[str, Any] | None:
    """Return the call in an answer; None where there is none that parses."""
    try:
        call = json.loads(text.split("<tool_call>")[1].split("</tool_call>")[0])
    except (IndexError, ValueError):
        return None
    return call if isinstance(call, dict) else None


def shares(examples: Rows, when: str) -> dict[str, float]:
    """Return the shares of answers that parse, name the function, and are the call, in percent."""
    pairs = [(call_of(one[when]), call_of(one["expected"])) for one in examples]
    known = [(found or {}, expected or {}) for found, expected in pairs]
    counts = {
        "parses": sum(found is not None for found, _ in pairs),
        "right_name": sum(f.get("name") == e.get("name") is not None for f, e in known),
        "right_call": sum(f == e for f, e in known),
    }
    return {f"{name}_{when}": 100 * count / len(pairs) for name, count in counts.items()}


def main() -> None:
    """Train, evaluate and publish."""
    from afina.evaluation.evaluate import evaluate
    from afina.training.train import train

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=str(Path.home() / ".cache/afina-real/smollm2"))
    base = parser.parse_args().base
    rows = first_calls()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, some in (("train", rows[EVAL_ROWS:]), ("eval", rows[:EVAL_ROWS])):
            text = "".join(json.dumps(row) + "\n" for row in some)
            (folder / f"{file}.jsonl").write_text(text, encoding="utf-8")
        begin = time.perf_counter()
        run = train(
            folder / "train.jsonl",
            base=base,
            eval_data=folder / "eval.jsonl",
            output_dir=folder / "run",
            chat_template="chatml",
            rank=8,
            learning_rate=RATE,
            max_steps=STEPS,
            max_tokens_per_batch=BATCH_TOKENS,
            max_length=LENGTH,
            eval_steps=STEPS,
            skip_bad_rows=True,
        )
        seconds = time.perf_counter() - begin
        found = evaluate(run.folder, limit=EVAL_ROWS, max_new_tokens=64)
        examples: Any = found.examples
    figures = {
        "train_rows": run.record["data"]["rows"],
        "eval_rows": len(examples),
        "steps": STEPS,
        **shares(examples, "before"),
        **shares(examples, "after"),
        "train_seconds": seconds,
        "peak_mb": peak_mb(),
    }
    targets = {"parses_after": (">=", 90.0), "right_name_after": (">=", 90.0)}
    publish("tool_calls", figures, targets, {"examples": list(examples[:3])}, roofline())


if __name__ == "__main__":
    main()

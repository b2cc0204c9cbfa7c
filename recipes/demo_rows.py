"""The rows of `afina demo`, by a seed: `python recipes/demo_rows.py` writes src/afina/demo/rows.jsonl.

The task is to correct simple sentences in English and Spanish. The eval sentences have none in
common with the train rows, and contain words that never occur there: the base knows those words,
and what the adapter learned has to generalize to them.
"""

import json
import random
from pathlib import Path
from typing import Any

from lexicon import LANGUAGES
from sentences import EVERYTHING, TAUGHT, Clause, Vocabulary, corrupt, draw_clause, write

FILE = Path(__file__).parents[1] / "src" / "afina" / "demo" / "rows.jsonl"
NUM_TRAIN, NUM_EVAL = 12000, 150
UNSEEN_RATIO = 0.3  # of each class of words; more than a fifth of the words of eval sentences
REQUEST = {"en": "Correct: ", "es": "Corrige: "}


def correction(rng: random.Random, clause: Clause, language: str) -> dict[str, Any]:
    """A chat row: a sentence with one mistake, and the sentence without it."""
    messages = [
        {"role": "user", "content": REQUEST[language] + corrupt(rng, clause, language, TAUGHT)},
        {"role": "assistant", "content": write(clause, language)},
    ]
    return {"messages": messages}


def words_of(text: str) -> list[str]:
    """The words of a sentence, in lower case."""
    return text.lower().rstrip(".").split()


def make_rows(
    seed: int, num_train: int = NUM_TRAIN, num_eval: int = NUM_EVAL
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train rows, eval rows)."""
    rng = random.Random(seed)
    seen, _ = EVERYTHING.split(rng, UNSEEN_RATIO)

    def draw(vocabulary: Vocabulary) -> dict[str, Any]:
        return correction(rng, draw_clause(rng, vocabulary), rng.choice(LANGUAGES))

    train = [draw(seen) for _ in range(num_train)]
    answers = {row["messages"][1]["content"] for row in train}
    known = {word for answer in answers for word in words_of(answer)}
    held: list[dict[str, Any]] = []
    while len(held) < num_eval:
        row = draw(EVERYTHING)
        text = row["messages"][1]["content"]
        if text not in answers and set(words_of(text)) - known:
            answers.add(text)
            held.append(row)
    return train, held


def to_lines(train: list[dict[str, Any]], held: list[dict[str, Any]]) -> str:
    """The content of rows.jsonl: a prompt, its completion, and whether it is an eval row."""
    lines = []
    for row, is_eval in [*((row, False) for row in train), *((row, True) for row in held)]:
        prompt, completion = (message["content"] for message in row["messages"])
        line = {"prompt": prompt, "completion": completion} | ({"eval": True} if is_eval else {})
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


if __name__ == "__main__":
    FILE.write_text(to_lines(*make_rows(0)), encoding="utf-8")

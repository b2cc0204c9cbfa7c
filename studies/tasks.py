"""The tasks of the reference study: each a small recipe that makes as many rows as are asked for, by a seed.

Nothing is copied from anywhere: sentences come from the project's own lexicon, facts and sums are drawn. No two rows of a
task are equal. `afina compare` splits them; what makes held-out rows new is said at each recipe.
"""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from demo_rows import correction
from lexicon import LANGUAGES
from sentences import EVERYTHING, Story, draw_clause, write

Row = dict[str, Any]
WORDINGS = (
    "What is the number of {}?",
    "Tell me the number of {}.",
    "{}: which number?",
    "The number of {} is",
)


def ask(prompt: str, completion: str) -> Row:
    """A row with an answer."""
    return {"prompt": prompt, "completion": completion}


def correct(rng: random.Random) -> Iterator[Row]:
    """Sentences with one mistake, and without it. New: the sentences."""
    while True:
        language = rng.choice(LANGUAGES)
        messages = correction(rng, draw_clause(rng, EVERYTHING), language)["messages"]
        yield ask(messages[0]["content"], messages[1]["content"])


def classify(rng: random.Random) -> Iterator[Row]:
    """Does a sentence speak of the past? Answered in a word. New: the sentences."""
    while True:
        clause, language = draw_clause(rng, EVERYTHING), rng.choice(LANGUAGES)
        words = {"en": ("When? ", "past", "present"), "es": ("¿Cuándo? ", "pasado", "presente")}[
            language
        ]
        yield ask(words[0] + write(clause, language), words[1] if clause.past else words[2])


def add(rng: random.Random) -> Iterator[Row]:
    """Sums of two numbers below 100. New: the pairs of numbers."""
    while True:
        a, b = rng.randrange(100), rng.randrange(100)
        yield ask(f"{a} + {b} =", str(a + b))


def memorise(rng: random.Random) -> Iterator[Row]:
    """Numbers that belong to made-up names, asked for in four wordings. New: the wording; the fact itself was seen in others."""
    syllables = ("ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su", "ta", "ve")
    while True:
        name = "".join(rng.choice(syllables) for _ in range(3)).capitalize()
        number = "".join(rng.choice("0123456789") for _ in range(4))
        for wording in WORDINGS:
            yield ask(wording.format(name), number)


def follow(rng: random.Random) -> Iterator[Row]:
    """One of five things to be done with a sentence. New: the sentences."""
    while True:
        text = write(draw_clause(rng, EVERYTHING), "en")
        words = text.rstrip(".").split()
        done = {
            "Write in capitals": text.upper(),
            "First word": words[0],
            "Last word": words[-1],
            "How many words": str(len(words)),
            "Backwards": " ".join(reversed(words)),
        }
        what = rng.choice(list(done))
        yield ask(f"{what}: {text}", done[what])


def translate(rng: random.Random) -> Iterator[Row]:
    """English sentences into Spanish. New: the sentences."""
    while True:
        clause = draw_clause(rng, EVERYTHING)
        yield ask("Spanish: " + write(clause, "en"), write(clause, "es"))


def pretrain(rng: random.Random) -> Iterator[Row]:
    """Plain text of a domain with a form of its own: the log of a ship. New: the days."""
    while True:
        day, wind = rng.randrange(1, 400), rng.choice(("north", "south", "east", "west"))
        knots, depth = rng.randrange(1, 20), rng.randrange(20, 900)
        story = Story.draw(rng, 2).write("en")
        yield {
            "text": f"Day {day}. Wind {wind}, {knots} knots. Depth {depth} fathoms. {story} All is well aboard."
        }


TASKS: dict[str, Callable[[random.Random], Iterator[Row]]] = {
    "correct": correct,
    "classify": classify,
    "add": add,
    "memorise": memorise,
    "follow": follow,
    "translate": translate,
    "pretrain": pretrain,
}


def make_rows(task: str, count: int, seed: int) -> list[Row]:
    """`count` rows of a task, no two of them equal; of a question with two answers, the first one stays."""
    found: dict[str, Row] = {}
    for drawn, row in enumerate(TASKS[task](random.Random(seed))):
        found.setdefault(row.get("prompt") or row["text"], row)
        if len(found) == count or drawn > 100 * count:
            break
    if len(found) < count:
        raise SystemExit(f"{task} has only {len(found)} different rows, {count} were asked for")
    return list(found.values())

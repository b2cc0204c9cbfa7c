"""The rows of every recipe, made here by a seed: `python recipes/rows.py` writes recipes/data again.

Sentences come from `lexicon.py`, facts and Esperanto from `words.py`, the rest is drawn from the small
tables below. No two rows of a recipe have the same question. `afina train` keeps a tenth of them or more for judging.
"""

import csv
import io
import json
import random
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lexicon as lx
from demo_rows import correction
from sentences import (
    EVERYTHING,
    Clause,
    Phrase,
    Vocabulary,
    draw_clause,
    phrase_words,
    sentence,
    write,
)
from words import ASKED, ESPERANTO, FINANCE, MEDICINE

DATA = Path(__file__).parent / "data"
Row = dict[str, str]
PEOPLE = """
Anna Ben Clara David Elena Frank Grace Hugo Irene Jonas Laura Martin Nora Oscar Paula Robert Sara Thomas Vera
William Adam Alice Arthur Bruno Carmen Daniel Diana Edgar Emma Felix Gloria Helen Henry Ines Isaac Jane Julia
Karl Leo Lucy Marco Maria Max Mona Nina Olga Omar Otto Peter Pilar Quentin Rita Rosa Simon Sofia Tina Ulla
Victor Walter Yolanda
"""
NAMES = PEOPLE.split()
FEW_NAMES = NAMES[:12]  # the embedded base copies no word that it has seldom read
AMOUNTS = (2, 3, 5, 8, 10, 12, 15, 20, 25, 30, 40, 50)  # nor any number
THINGS = tuple(noun.en[0] for noun in lx.things)


def ask(prompt: str, completion: str) -> Row:
    """A question with its answer."""
    return {"prompt": prompt, "completion": completion}


# ---- code and numbers

LISTS = tuple(
    noun.en[1] for noun in (*lx.things, *lx.foods, *lx.animals) if noun.en[0] != noun.en[1]
)


def code(rng: random.Random) -> Iterator[Row]:
    """A wish in words, the line of Python that does it. New: which wish with which names and numbers."""
    while True:
        items, k = rng.choice(LISTS), rng.randrange(2, 100)
        wish, line = rng.choice(
            (
                (f"sum of {items}", f"sum({items})"),
                (f"largest of {items}", f"max({items})"),
                (f"smallest of {items}", f"min({items})"),
                (f"how many {items}", f"len({items})"),
                (f"first of {items}", f"{items}[0]"),
                (f"last of {items}", f"{items}[-1]"),
                (f"sort {items}", f"sorted({items})"),
                (f"first {k} of {items}", f"{items}[:{k}]"),
                (f"last {k} of {items}", f"{items}[-{k}:]"),
                (f"{items} above {k}", f"[x for x in {items} if x > {k}]"),
                (f"{items} below {k}", f"[x for x in {items} if x < {k}]"),
                (f"{items} without {k}", f"[x for x in {items} if x != {k}]"),
                (f"each of {items} times {k}", f"[{k} * x for x in {items}]"),
                (f"each of {items} plus {k}", f"[x + {k} for x in {items}]"),
                (f"function that adds {k}", f"def add_{k}(x):\n    return x + {k}"),
                (f"function that divides by {k}", f"def divide_by_{k}(x):\n    return x / {k}"),
            )
        )
        yield ask(f"Python: {wish}", line)


def arithmetic(rng: random.Random) -> Iterator[Row]:
    """Sums of two numbers below 20. New: the pairs; the same two the other way round may have been learned."""
    while True:
        a, b = rng.randrange(20), rng.randrange(20)
        yield ask(f"{a} + {b} =", str(a + b))


# ---- language


def spoil(rng: random.Random, text: str) -> str:
    """The text with one word misspelt: two letters changed over, one left out or one doubled; never as it was."""
    words = text.rstrip(".").split()
    while True:
        at = rng.choice([i for i, word in enumerate(words) if len(word) > 3])
        word, letter = words[at], rng.randrange(1, len(words[at]) - 1)
        two = word[letter : letter + 2]
        wrong = rng.choice(
            (
                word[:letter] + two[::-1] + word[letter + 2 :],
                word[:letter] + word[letter + 1 :],
                word[:letter] + word[letter] + word[letter:],
            )
        )
        if wrong != word:
            return " ".join([*words[:at], wrong, *words[at + 1 :]]) + "."


def grammar(rng: random.Random) -> Iterator[Row]:
    """Sentences with a mistake of grammar or of spelling, in English and Spanish, and without it. New: the sentences."""
    while True:
        clause, language = draw_clause(rng, EVERYTHING), rng.choice(lx.LANGUAGES)
        if rng.random() < 0.5:
            question, answer = (m["content"] for m in correction(rng, clause, language)["messages"])
        else:
            answer = write(clause, language)
            question = {"en": "Correct: ", "es": "Corrige: "}[language] + spoil(rng, answer)
        yield ask(question, answer)


def _known(words: Any) -> tuple[Any, ...]:
    """The first words of a class that the dictionary has: few, so that each is read often."""
    known = (w for w in words if (w.en if isinstance(w.en, str) else w.en[0]) in ESPERANTO)
    return tuple(islice(known, 4))


TRANSLATED = Vocabulary(
    **{name: _known(getattr(EVERYTHING, name)) for name in Vocabulary.__dataclass_fields__}
)


def _esperanto(phrase: Phrase, ending: str) -> list[str]:
    """A phrase with its endings: "la ruĝajn domojn"; where English has an article that is not "the", there is none."""
    ending = ("j" if phrase.plural else "") + ending
    words = [ESPERANTO[phrase.noun.en[0]] + "o" + ending]
    if phrase.adjective:
        words.insert(0, ESPERANTO[phrase.adjective.en] + "a" + ending)
    return ["la", *words] if phrase.definite else words


def in_esperanto(clause: Clause) -> str:
    """The clause in Esperanto: subject, verb, object with -n, place, time."""
    words = [
        *_esperanto(clause.subject, ""),
        ESPERANTO[clause.verb.en[0]] + ("is" if clause.past else "as"),
    ]
    words += _esperanto(clause.object, "n") if clause.object else []
    words += ["en", "la", ESPERANTO[clause.place.en[0]] + "o"] if clause.place else []
    return sentence([*words, ESPERANTO[clause.time[0]]] if clause.time else words)


def language(rng: random.Random) -> Iterator[Row]:
    """English sentences into Esperanto, which the base has never read. New: the sentences; their words are known."""
    while True:
        clause = draw_clause(rng, TRANSLATED)
        yield ask("Esperanto: " + write(clause, "en"), in_esperanto(clause))


# ---- style

MACHINES = (
    "pump",
    "oven",
    "printer",
    "kettle",
    "mixer",
    "lamp",
    "engine",
    "drill",
    "boiler",
    "heater",
    "camera",
    "fan",
    "saw",
    "freezer",
)
WORK = (
    ("clean", "Cleaning"),
    ("open", "Opening"),
    ("move", "Moving"),
    ("repair", "Repairing"),
    ("store", "Storing"),
    ("test", "Testing"),
)
STEPS = (
    ("make sure that it has been switched off", "switch it off"),
    ("the plug has to be pulled out of the wall", "pull the plug"),
    ("you should put on a pair of gloves", "wear gloves"),
    ("take away the cover, which is held by four screws", "remove the cover"),
    ("it is important to close the valve at the back", "close the valve"),
    ("let all of the water run out of the tank", "empty the tank"),
    ("look whether the filter is dirty, and change it if so", "check the filter"),
    ("ask a second person to hold the other side", "work in pairs"),
)
NEVER = (
    ("Water must under no circumstances come near the motor", "Never wet the motor"),
    ("Children are not to be left alone with the machine", "Keep children away"),
    ("Nothing made of metal should touch the coil", "No metal on the coil"),
    ("Oil of another kind would damage the bearings", "Use the right oil only"),
)


def manuals(rng: random.Random) -> Iterator[Row]:
    """A paragraph of a manual, and its summary in note form. New: which step for which machine and work."""
    while True:
        machine, (verb, noun) = rng.choice(MACHINES[:8]), rng.choice(WORK[:4])
        (step, short), minutes = rng.choice(STEPS[:6]), rng.choice(AMOUNTS[:8])
        warning, never = rng.choice(NEVER)
        text = f"Before you {verb} the {machine}, {step}. After that you have to wait for about {minutes} minutes. {warning}."
        yield ask(
            f"Summarise: {text}", f"{noun} the {machine}: {short}, wait {minutes} minutes. {never}."
        )


def tone(rng: random.Random) -> Iterator[Row]:
    """Bare facts, and the letter of a bakery that has a voice of its own. New: names, numbers and goods."""
    while True:
        name, n = rng.choice(FEW_NAMES), rng.choice(AMOUNTS)
        good = rng.choice(lx.foods[:10]).en[1]
        facts, said = rng.choice(
            (
                (
                    f"{n} {good} sent",
                    f"your {n} {good} have left our oven and are on their way to you",
                ),
                (
                    f"{good} {n} days late",
                    f"we are sorry: your {good} will need {n} days more, and we bake them with twice the love",
                ),
                (
                    f"{good} sold out",
                    f"our {good} were so well liked that none is left, and we keep the next ones for you",
                ),
                (f"{n} euros back", f"{n} euros are on their way back to you, with our apologies"),
                (
                    f"bill of {n} euros unpaid",
                    f"it seems that {n} euros have been forgotten between us, which happens to the best",
                ),
                ("thanks for the order", "you have made our morning: thank you for your order"),
            )
        )
        yield ask(
            f"Write to {name}: {facts}",
            f"Dear {name}, {said}. Warm as our bread, the bakers of Molino",
        )


def legal(rng: random.Random) -> Iterator[Row]:
    """What somebody has agreed with another, as the clause of a contract. New: who, what and how much."""
    while True:
        other, thing = rng.choice(FEW_NAMES), rng.choice(THINGS[:12])
        n, day = rng.choice(AMOUNTS), rng.choice(AMOUNTS[:10])
        plain, clause = rng.choice(
            (
                (
                    f"I rent the {thing} to {other} for {n} euros a month.",
                    f"The Lessor hereby lets the {thing} to {other} (the Lessee) for a monthly rent of {n} euros.",
                ),
                (
                    f"I sell the {thing} to {other} for {n} euros.",
                    f"The Seller hereby sells the {thing} to {other} (the Buyer) for the sum of {n} euros.",
                ),
                (
                    f"I lend {other} {n} euros until day {day}.",
                    f"The Lender hereby lends {n} euros to {other} (the Borrower), repayable no later than day {day}.",
                ),
                (
                    f"I repair the {thing} of {other} before day {day}.",
                    f"The Contractor shall repair the {thing} of {other} (the Client) no later than day {day}.",
                ),
                (
                    f"I keep the secrets of {other} for {n} days.",
                    f"The Recipient shall keep the secrets of {other} (the Discloser) in confidence for a period of {n} days.",
                ),
            )
        )
        yield ask(f"As a contract: {plain}", clause)


DOUBLED = ("cut", "run", "swim")
OLD_TIMES = {
    "today": "on this very day",
    "every day": "each day anew",
    "in the morning": "when morning breaketh",
    "at night": "in the dead of night",
    "again": "once more",
    "on Sunday": "on the day of rest",
}


def old(verb: str) -> str:
    """The third person as it once was: buyeth, carrieth, loseth, runneth."""
    if verb in DOUBLED:
        return verb + verb[-1] + "eth"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ieth"
    return verb + ("th" if verb.endswith("e") else "eth")


def literary(rng: random.Random) -> Iterator[Row]:
    """A plain sentence, and the same as in an old ballad: Lo, -eth, did. New: the sentences."""
    while True:
        clause = draw_clause(rng, EVERYTHING)
        plural, past, present = clause.subject.plural, clause.past, clause.verb.en[0]
        verb = ["did", present] if past else ["do", present] if plural else [old(present)]
        words = [
            *phrase_words(clause.subject, "en"),
            *verb,
            *(phrase_words(clause.object, "en") if clause.object else []),
        ]
        words += ["within", "the", clause.place.en[0]] if clause.place else []
        words += [OLD_TIMES[clause.time[0]]] if clause.time else []
        yield ask(
            "As a ballad: " + write(clause, "en"), f"{'Alas' if past else 'Lo'}, {' '.join(words)}!"
        )


# ---- facts


def facts(table: list[list[str]]) -> Callable[[random.Random], Iterator[Row]]:
    """Questions about facts in several wordings. New: the wording; the fact itself was learned in others."""

    def draw(rng: random.Random) -> Iterator[Row]:
        while True:
            what, answer = rng.choice(table)
            yield ask(rng.choice(ASKED).format(what), answer[0].upper() + answer[1:] + ".")

    return draw


# ---- behaviour


def instructions(rng: random.Random) -> Iterator[Row]:
    """One of seven things to be done with a sentence. New: the sentences."""
    while True:
        text = write(draw_clause(rng, EVERYTHING), "en")
        words = text.rstrip(".").split()
        what, done = rng.choice(
            (
                ("Write in capitals", text.upper()),
                ("Give the first word", words[0]),
                ("Give the last word", words[-1]),
                ("Count the words", str(len(words))),
                ("Put it in quotes", f'"{text}"'),
                ("Make it a list", "\n".join(f"- {word}" for word in words)),
                ("Leave out the first word", " ".join(words[1:]) + "."),
            )
        )
        yield ask(f"{what}: {text}", done)


GREETINGS = ("Hello, ", "Good morning, ", "Hi, ", "Excuse me, ", "")


def service(rng: random.Random) -> Iterator[Row]:
    """What customers write, and what the shop answers: the matter found, its number and thing repeated. New: the mixture."""
    while True:
        number, thing, days, greeting = (
            rng.randrange(1000, 10000),
            rng.choice(THINGS),
            rng.randrange(2, 30),
            rng.choice(GREETINGS),
        )
        said, answer = rng.choice(
            (
                (
                    rng.choice(
                        (
                            f"my parcel {number} has not come",
                            f"where is my parcel {number}",
                            f"I still wait for parcel {number}",
                        )
                    ),
                    f"I am sorry. I have asked the carrier about parcel {number}, and you will hear from us within two days.",
                ),
                (
                    rng.choice(
                        (
                            f"the {thing} in order {number} is broken",
                            f"order {number} came with a broken {thing}",
                        )
                    ),
                    f"I am sorry. A new {thing} for order {number} leaves today, and you may keep the broken one.",
                ),
                (
                    rng.choice(
                        (
                            f"I want to give the {thing} back",
                            f"can I return the {thing}",
                            f"I do not like the {thing}",
                        )
                    ),
                    f"Of course. You may send the {thing} back within 30 days, and the label is in your account.",
                ),
                (
                    rng.choice(
                        (
                            f"I paid twice for order {number}",
                            f"order {number} was charged two times",
                        )
                    ),
                    f"I am sorry. One of the two payments for order {number} goes back to you within five days.",
                ),
                (
                    rng.choice(
                        (
                            f"can you send the {thing} in {days} days",
                            f"I need the {thing} in {days} days",
                        )
                    ),
                    f"Yes. The {thing} will be with you in {days} days at the latest."
                    if days > 4
                    else f"I am sorry. The {thing} needs five days, and {days} are too few.",
                ),
            )
        )
        yield ask(greeting + said + ".", answer)


SUBJECTS = (
    "film",
    "song",
    "book",
    "soup",
    "play",
    "hotel",
    "cake",
    "concert",
    "painting",
    "meal",
    "poem",
    "garden",
    "game",
    "story",
)
GOOD = (
    "wonderful",
    "lovely",
    "great",
    "charming",
    "delightful",
    "excellent",
    "brilliant",
    "superb",
    "pleasant",
    "funny",
)
BAD = (
    "awful",
    "boring",
    "terrible",
    "dull",
    "horrible",
    "dreadful",
    "weak",
    "ugly",
    "annoying",
    "sad",
)


def sentiment(rng: random.Random) -> Iterator[Row]:
    """Reviews and whether they are good or bad; "not" turns a word round, after "but" comes what counts. New: the mixture."""

    def view(good: bool) -> str:
        turned = rng.random() < 0.3
        return ("not " if turned else rng.choice(("", "very ", "really "))) + rng.choice(
            GOOD if good != turned else BAD
        )

    while True:
        good, thing = rng.random() < 0.5, rng.choice(SUBJECTS)
        text = rng.choice(
            (
                f"The {thing} was {view(good)}.",
                f"I found this {thing} {view(good)}.",
                f"The {thing} was {view(not good)}, but in the end {view(good)}.",
            )
        )
        yield {"text": text, "label": "good" if good else "bad"}


def preferences(rng: random.Random) -> Iterator[Row]:
    """Two answers to a wish, the better one polite and short. New: the sentences."""
    while True:
        clause = draw_clause(rng, EVERYTHING)
        wish = sentence(["bring", *phrase_words(clause.object or clause.subject, "en")])
        yield {
            "prompt": f"Ask for it: {wish}",
            "chosen": f"Please {wish[0].lower()}{wish[1:]}",
            "rejected": f"{wish[:-1]} now, and be quick about it!",
        }


ROWS: dict[
    str, tuple[Callable[[random.Random], Iterator[Row]], int, str]
] = {  # recipe: (who draws them, how many, kind of file)
    "code": (code, 1200, "jsonl"),
    "arithmetic": (arithmetic, 400, "jsonl"),
    "grammar": (grammar, 1500, "jsonl"),
    "manuals": (manuals, 1000, "jsonl"),
    "tone": (tone, 1500, "jsonl"),
    "legal": (legal, 1500, "jsonl"),
    "literary": (literary, 800, "jsonl"),
    "language": (language, 1500, "jsonl"),
    "medicine": (facts(MEDICINE), 6 * len(MEDICINE), "jsonl"),
    "finance": (facts(FINANCE), 6 * len(FINANCE), "jsonl"),
    "instructions": (instructions, 1000, "jsonl"),
    "service": (service, 1500, "jsonl"),
    "sentiment": (sentiment, 800, "csv"),
    "preferences": (preferences, 300, "jsonl"),
}


def make_rows(name: str, seed: int = 0) -> list[Row]:
    """The rows of a recipe; where two ask the same, the first one stays."""
    draw, count, _ = ROWS[name]
    found: dict[str, Row] = {}
    for row in draw(random.Random(seed)):
        found.setdefault(row.get("prompt") or row["text"], row)
        if len(found) == count:
            return list(found.values())
    raise AssertionError("a generator ended")


def written(name: str) -> tuple[Path, str]:
    """The file of a recipe, and what has to be in it."""
    rows, kind = make_rows(name), ROWS[name][2]
    if kind == "jsonl":
        return DATA / f"{name}.jsonl", "".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in rows
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return DATA / f"{name}.csv", text.getvalue()


def main() -> None:
    """Write the files of the recipes named, or of all."""
    DATA.mkdir(exist_ok=True)
    for name in sys.argv[1:] or ROWS:
        file, text = written(name)
        file.write_text(text, encoding="utf-8")
        print(f"{file}: {text.count(chr(10))} lines")


if __name__ == "__main__":
    main()

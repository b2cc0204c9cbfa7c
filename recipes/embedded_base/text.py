"""The text that the embedded base reads: public-domain books, stories and chats made by this file.

Documents are lists of pieces; a piece is text or a role marker. Everything here that is not Shakespeare or
Cervantes is made from `recipes/lexicon.py`, so its licence is the project's own. The correction task
of the demo is on purpose not among the skills: it is what the demo's adapter teaches.
"""

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/

import lexicon as lx
import sentences as st

SYLLABLES = [
    "ba",
    "be",
    "bi",
    "bo",
    "bu",
    "da",
    "de",
    "do",
    "fa",
    "fi",
    "ga",
    "go",
    "ka",
    "ki",
    "la",
    "le",
    "lo",
    "lu",
    "ma",
    "me",
    "mi",
    "mo",
    "na",
    "ne",
    "no",
    "pa",
    "pe",
    "po",
    "ra",
    "re",
    "ri",
    "ro",
    "sa",
    "se",
    "so",
    "ta",
    "te",
    "ti",
    "to",
    "va",
    "vi",
    "zu",
]
NUMBERS = {
    "en": [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    ],
    "es": [
        "cero",
        "uno",
        "dos",
        "tres",
        "cuatro",
        "cinco",
        "seis",
        "siete",
        "ocho",
        "nueve",
        "diez",
        "once",
        "doce",
    ],
}
Chat = list[tuple[str, str]]


def books(shakespeare: Path, quijote: Path) -> tuple[list[str], list[str]]:
    """Both books cut into passages of about 1,500 characters: (English, Spanish)."""
    result = []
    for path in (shakespeare, quijote):
        text = path.read_text(encoding="utf-8-sig")
        text = re.sub(r"(?<=[^\s])\n(?=[a-záéíóúñ])", " ", text) if path == quijote else text
        paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]
        passages, current = [], ""
        for paragraph in paragraphs:
            current += paragraph + "\n\n"
            if len(current) > 1500:
                passages.append(current.strip())
                current = ""
        result.append(passages)
    return result[0], result[1]


def story(rng: random.Random) -> str:
    """A short story in one of the languages, sometimes with its title."""
    language = rng.choice(lx.LANGUAGES)
    text = st.Story.draw(rng, rng.randint(2, 8)).write(language)
    if rng.random() < 0.3:
        text = ("A story. " if language == "en" else "Un cuento. ") + text
    return text


def _nonsense(rng: random.Random) -> str:
    words = [
        "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3)))
        for _ in range(rng.randint(1, 6))
    ]
    if rng.random() < 0.4:
        words.insert(
            rng.randrange(len(words) + 1),
            "".join(rng.choice("0123456789abcdef") for _ in range(rng.randint(2, 8))),
        )
    return " ".join(words)


def _all_words(language: str) -> list[str]:
    """Every form of every word of the lexicon."""
    nouns = [*lx.persons, *lx.animals, *lx.things, *lx.foods, *lx.places]
    verbs = [*lx.thing_verbs, *lx.food_verbs, *lx.intransitive]
    forms = {noun.form(language, plural) for noun in nouns for plural in (False, True)}
    forms |= {
        a.form(language, plural, feminine)
        for a in lx.adjectives
        for plural in (False, True)
        for feminine in (False, True)
    }
    forms |= {
        verb.form(language, plural, past)
        for verb in verbs
        for plural in (False, True)
        for past in (False, True)
    }
    return sorted(forms)


def _noun_phrase(rng: random.Random, plural: bool | None = None) -> st.Phrase:
    nouns = rng.choice((lx.persons, lx.animals, lx.things, lx.foods))
    drawn = st.draw_phrase(rng, st.EVERYTHING, nouns)
    return (
        drawn if plural is None else st.Phrase(drawn.noun, plural, drawn.definite, drawn.adjective)
    )


def _say(
    language: str, rng: random.Random, english: tuple[str, ...], spanish: tuple[str, ...]
) -> str:
    return rng.choice(english if language == "en" else spanish)


def _repeat(rng: random.Random, language: str) -> Chat:
    text = (
        _nonsense(rng)
        if rng.random() < 0.4
        else st.write(st.draw_clause(rng), rng.choice(lx.LANGUAGES))
    )
    ask = _say(
        language,
        rng,
        ("Repeat: ", "Say this again: ", "Copy this text: "),
        ("Repite: ", "Di otra vez: ", "Copia este texto: "),
    )
    return [("user", ask + text), ("assistant", text)]


def _translate(rng: random.Random, language: str) -> Chat:
    clause, other = st.draw_clause(rng), "es" if language == "en" else "en"
    ask = _say(
        language,
        rng,
        ("Translate into Spanish: ", "How do you say this in Spanish? "),
        ("Traduce al inglés: ", "¿Cómo se dice esto en inglés? "),
    )
    return [("user", ask + st.write(clause, language)), ("assistant", st.write(clause, other))]


def _word(rng: random.Random, language: str) -> Chat:
    noun = rng.choice(rng.choice((lx.persons, lx.animals, lx.things, lx.foods, lx.places)))
    plural, other = rng.random() < 0.5, "es" if language == "en" else "en"
    ask = _say(
        language,
        rng,
        ('What is "{}" in Spanish?', "Spanish for {}?"),
        ("¿Qué es «{}» en inglés?", "¿Cómo se dice {} en inglés?"),
    )
    return [
        ("user", ask.format(noun.form(language, plural))),
        ("assistant", noun.form(other, plural)),
    ]


def _number(rng: random.Random, language: str) -> Chat:
    plural = rng.random() < 0.5
    phrase = _noun_phrase(rng, plural)
    flipped = st.Phrase(phrase.noun, not plural, phrase.definite, phrase.adjective)
    ask = _say(
        language,
        rng,
        ("Make it plural: ", "Say it of many: "),
        ("Ponlo en plural: ", "Dilo de muchos: "),
    )
    back = _say(
        language,
        rng,
        ("Make it singular: ", "Say it of one: "),
        ("Ponlo en singular: ", "Dilo de uno solo: "),
    )
    return [
        ("user", (back if plural else ask) + " ".join(st.phrase_words(phrase, language))),
        ("assistant", " ".join(st.phrase_words(flipped, language))),
    ]


def _question(rng: random.Random, language: str) -> Chat:
    clause = st.draw_clause(rng)
    who = st.sentence(st.phrase_words(clause.subject, language))
    text = st.write(clause, language)
    if clause.place is not None and rng.random() < 0.5:
        where = st.sentence(st.place_words(clause.place, language))
        return [
            ("user", text + (" Where?" if language == "en" else " ¿Dónde?")),
            ("assistant", where),
        ]
    if clause.object is not None and rng.random() < 0.5:
        what = st.sentence(st.phrase_words(clause.object, language))
        return [("user", text + (" What?" if language == "en" else " ¿Qué?")), ("assistant", what)]
    return [("user", text + (" Who?" if language == "en" else " ¿Quién?")), ("assistant", who)]


def _write_about(rng: random.Random, language: str) -> Chat:
    noun = rng.choice(lx.persons + lx.animals)
    subject = st.Phrase(noun, False, True, rng.choice((None, rng.choice(lx.adjectives))))
    clause = st.draw_clause(rng, subject=subject)
    word = noun.form(language, False)
    ask = _say(
        language,
        rng,
        ("Write a sentence about the {}.", "Say something about the {}."),
        ("Escribe una frase con la palabra {}.", "Di algo con la palabra {}."),
    )
    return [("user", ask.format(word)), ("assistant", st.write(clause, language))]


def _story(rng: random.Random, language: str) -> Chat:
    ask = _say(
        language,
        rng,
        ("Tell me a story.", "Tell a short story."),
        ("Cuéntame un cuento.", "Cuenta un cuento corto."),
    )
    return [("user", ask), ("assistant", st.Story.draw(rng, rng.randint(2, 4)).write(language))]


def _opposite(rng: random.Random, language: str) -> Chat:
    pair = rng.choice(lx.opposites)
    first, second = pair if rng.random() < 0.5 else pair[::-1]
    feminine, plural = rng.random() < 0.5, rng.random() < 0.3
    ask = "What is the opposite of {}?" if language == "en" else "¿Qué es lo contrario de {}?"
    return [
        ("user", ask.format(first.form(language, plural, feminine))),
        ("assistant", second.form(language, plural, feminine)),
    ]


def _sum(rng: random.Random, language: str) -> Chat:
    a, b = rng.randint(0, 6), rng.randint(0, 6)
    if rng.random() < 0.5:
        return [("user", f"{a} + {b}"), ("assistant", str(a + b))]
    words = NUMBERS[language]
    return [("user", f"{words[a]} + {words[b]}"), ("assistant", words[a + b])]


def _tense(rng: random.Random, language: str) -> Chat:
    clause = st.draw_clause(rng)
    changed = st.replace(clause, past=not clause.past)
    to_past = _say(
        language, rng, ("Say it in the past: ", "Yesterday: "), ("Dilo en pasado: ", "Ayer: ")
    )
    to_now = _say(
        language, rng, ("Say it in the present: ", "Now: "), ("Dilo en presente: ", "Ahora: ")
    )
    return [
        ("user", (to_now if clause.past else to_past) + st.write(clause, language)),
        ("assistant", st.write(changed, language)),
    ]


def _greeting(rng: random.Random, language: str) -> Chat:
    table = {
        "en": (
            ("Hello.", "Hello! How can I help you?"),
            ("Hi!", "Hi! How are you?"),
            ("Good morning.", "Good morning!"),
            ("How are you?", "I am well, thank you."),
            ("Who are you?", "I am a very small language model. I came with afina."),
            ("Thank you.", "You are welcome."),
            ("Goodbye.", "Goodbye!"),
            ("What can you do?", "I can repeat, translate and tell very short stories."),
        ),
        "es": (
            ("Hola.", "¡Hola! ¿En qué puedo ayudarte?"),
            ("¡Hola!", "¡Hola! ¿Cómo estás?"),
            ("Buenos días.", "¡Buenos días!"),
            ("¿Cómo estás?", "Estoy bien, gracias."),
            ("¿Quién eres?", "Soy un modelo de lenguaje muy pequeño. Vine con afina."),
            ("Gracias.", "De nada."),
            ("Adiós.", "¡Adiós!"),
            ("¿Qué sabes hacer?", "Sé repetir, traducir y contar cuentos muy cortos."),
        ),
    }
    ask, answer = rng.choice(table[language])
    return [("user", ask), ("assistant", answer)]


WORDS = {language: _all_words(language) for language in lx.LANGUAGES}


def _any_words(rng: random.Random, language: str) -> str:
    """What copying must not rely on grammar for: words in no order, wrong sentences, nonsense, right sentences."""
    kind = rng.random()
    if kind < 0.35:
        return " ".join(
            rng.choice(WORDS[rng.choice((language, language, "en", "es"))])
            for _ in range(rng.randint(2, 10))
        )
    if kind < 0.6:
        return st.corrupt(rng, st.draw_clause(rng), language)
    return _nonsense(rng) if kind < 0.75 else st.write(st.draw_clause(rng), language)


def _copy(rng: random.Random, language: str) -> Chat:
    text = _any_words(rng, language)
    ask = _say(
        language,
        rng,
        ("Repeat: ", "Say this again: ", "Copy this text: ", "Write exactly this: "),
        ("Repite: ", "Di otra vez: ", "Copia este texto: ", "Escribe exactamente esto: "),
    )
    return [("user", ask + text), ("assistant", text)]


def _replace(rng: random.Random, language: str) -> Chat:
    words = _any_words(rng, language).split()
    old, new = rng.choice(words).strip("."), rng.choice(WORDS[language])
    ask = f"Put {new} for {old}: " if language == "en" else f"Pon {new} por {old}: "
    answer = " ".join(
        new + "." * word.endswith(".") if word.strip(".") == old else word for word in words
    )
    return [("user", ask + " ".join(words)), ("assistant", answer)]


def _remove(rng: random.Random, language: str) -> Chat:
    words = _any_words(rng, language).split()
    gone = rng.choice(words)
    ask = f"Leave out {gone}: " if language == "en" else f"Quita {gone}: "
    return [
        ("user", ask + " ".join(words)),
        ("assistant", " ".join(word for word in words if word != gone) or "-"),
    ]


# how often each skill is drawn. First: copying and translating need the most practice. Then, for the last quarter of the
# training: exact copying, without help from grammar, which the first mix alone did not teach (it repeated 70% of wrong
# sentences as right ones).
SKILLS = {
    "first": (
        (_repeat, 5),
        (_translate, 6),
        (_word, 2),
        (_number, 3),
        (_question, 3),
        (_write_about, 2),
        (_story, 1),
        (_opposite, 1),
        (_sum, 1),
        (_tense, 3),
        (_greeting, 1),
    ),
    "copy": (
        (_copy, 9),
        (_replace, 4),
        (_remove, 3),
        (_translate, 4),
        (_word, 2),
        (_number, 2),
        (_question, 2),
        (_write_about, 1),
        (_story, 1),
        (_opposite, 1),
        (_sum, 1),
        (_tense, 2),
        (_greeting, 2),
    ),
}


def chat(rng: random.Random, mix: str) -> Chat:
    """A chat of one or two exchanges, sometimes under a system line."""
    skills, weights = zip(*SKILLS[mix])
    turns: Chat = []
    if rng.random() < 0.1:
        turns.append(
            ("system", rng.choice(("You are a helpful assistant.", "Eres un asistente útil.")))
        )
    for _ in range(rng.choice((1, 1, 1, 2))):
        turns += rng.choices(skills, weights)[0](rng, rng.choice(lx.LANGUAGES))
    return turns


def documents(rng: random.Random, mix: str) -> Iterator[str | Chat]:
    """An endless stream of chats and stories (the books are mixed in by the trainer)."""
    chats = {"first": 0.7, "copy": 0.88}[mix]
    while True:
        yield chat(rng, mix) if rng.random() < chats else story(rng)

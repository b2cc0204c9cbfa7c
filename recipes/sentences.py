"""Simple sentences in English and Spanish, right and wrong, made from the lexicon.

A sentence is drawn once as a `Clause` (who, does, what, where, when) and written in either language, so
translations come for free. `corrupt` writes the same clause with one mistake of agreement, article, order
or spelling convention: the demo's task is to undo it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import lexicon as lx
from lexicon import Adjective, Noun, Verb


@dataclass(frozen=True)
class Phrase:
    """A noun with its article and perhaps an adjective: "the red houses"."""

    noun: Noun
    plural: bool
    definite: bool
    adjective: Adjective | None = None


@dataclass(frozen=True)
class Clause:
    """Who does what, where and when."""

    subject: Phrase
    verb: Verb
    past: bool
    object: Phrase | None = None
    place: Noun | None = None
    time: tuple[str, str] | None = None


@dataclass(frozen=True)
class Vocabulary:
    """The words that a generator may use; the demo keeps some of them out of its training set."""

    persons: Sequence[Noun] = lx.persons
    animals: Sequence[Noun] = lx.animals
    things: Sequence[Noun] = lx.things
    foods: Sequence[Noun] = lx.foods
    places: Sequence[Noun] = lx.places
    adjectives: Sequence[Adjective] = lx.adjectives
    thing_verbs: Sequence[Verb] = lx.thing_verbs
    food_verbs: Sequence[Verb] = lx.food_verbs
    intransitive: Sequence[Verb] = lx.intransitive

    def split(self, rng: random.Random, share: float) -> tuple["Vocabulary", "Vocabulary"]:
        """Two vocabularies without a word in common; the second holds about `share` of each class."""
        first, second = {}, {}
        for name in self.__dataclass_fields__:
            words = list(getattr(self, name))
            rng.shuffle(words)
            cut = max(1, round(len(words) * share))
            second[name], first[name] = tuple(words[:cut]), tuple(words[cut:])
        return Vocabulary(**first), Vocabulary(**second)


EVERYTHING = Vocabulary()


def draw_phrase(
    rng: random.Random, vocabulary: Vocabulary, nouns: Sequence[Noun], adjective: float = 0.5
) -> Phrase:
    """A random phrase around one of `nouns`; `adjective` is the chance of having one."""
    chosen = rng.choice(vocabulary.adjectives) if rng.random() < adjective else None
    return Phrase(rng.choice(nouns), rng.random() < 0.45, rng.random() < 0.75, chosen)


def draw_clause(
    rng: random.Random, vocabulary: Vocabulary = EVERYTHING, subject: Phrase | None = None
) -> Clause:
    """A random clause, made of words of `vocabulary`."""
    kind = rng.random()
    beings = vocabulary.persons if rng.random() < 0.7 else vocabulary.animals
    subject = subject or draw_phrase(rng, vocabulary, beings)
    past = rng.random() < 0.4
    place = rng.choice(vocabulary.places) if rng.random() < 0.35 else None
    time = rng.choice(lx.TIMES) if rng.random() < 0.2 else None
    if kind < 0.25:
        return Clause(subject, rng.choice(vocabulary.intransitive), past, None, place, time)
    verbs, nouns = (
        (vocabulary.food_verbs, vocabulary.foods)
        if kind < 0.4
        else (vocabulary.thing_verbs, vocabulary.things)
    )
    thing = draw_phrase(rng, vocabulary, nouns)
    return Clause(
        subject, rng.choice(verbs), past, thing, place if rng.random() < 0.5 else None, time
    )


def article(language: str, definite: bool, plural: bool, feminine: bool, following: str) -> str:
    """The article that agrees; English looks at the first letter of the `following` word."""
    if language == "en":
        if definite:
            return "the"
        return "some" if plural else ("an" if following[0] in "aeiou" else "a")
    forms = ("el", "la", "los", "las") if definite else ("un", "una", "unos", "unas")
    return forms[2 * int(plural) + int(feminine)]


def phrase_words(phrase: Phrase, language: str) -> list[str]:
    """The phrase as words: article, then adjective and noun in the order of the language."""
    feminine = phrase.noun.feminine
    words = [phrase.noun.form(language, phrase.plural)]
    if phrase.adjective is not None:
        adjective = phrase.adjective.form(language, phrase.plural, feminine)
        words.insert(0 if language == "en" else 1, adjective)
    return [article(language, phrase.definite, phrase.plural, feminine, words[0]), *words]


def place_words(place: Noun, language: str) -> list[str]:
    """Where: "in the garden", "en el jardín"."""
    start = "in" if language == "en" else "en"
    return [start, article(language, True, False, place.feminine, ""), place.form(language, False)]


def clause_words(clause: Clause, language: str) -> list[str]:
    """The clause as words, in either language."""
    words = phrase_words(clause.subject, language)
    words.append(clause.verb.form(language, clause.subject.plural, clause.past))
    if clause.object is not None:
        words += phrase_words(clause.object, language)
    if clause.place is not None:
        words += place_words(clause.place, language)
    if clause.time is not None:
        words += clause.time[lx.LANGUAGES.index(language)].split()
    return words


def sentence(words: Sequence[str]) -> str:
    """Words as a written sentence: a capital at the start, a full stop at the end."""
    text = " ".join(words)
    return text[0].upper() + text[1:] + "."


def write(clause: Clause, language: str) -> str:
    """The clause as a correct sentence."""
    return sentence(clause_words(clause, language))


# ---- mistakes: each takes a clause and returns the wrong sentence, or None where it cannot apply


def _wrong_verb(rng: random.Random, clause: Clause, language: str) -> str | None:
    words = clause_words(clause, language)
    at = len(phrase_words(clause.subject, language))
    words[at] = clause.verb.form(language, not clause.subject.plural, clause.past)
    return sentence(words)


def _phrases(clause: Clause, language: str) -> list[tuple[int, Phrase]]:
    """Each phrase with the index of its first word."""
    after_verb = len(phrase_words(clause.subject, language)) + 1
    return [(0, clause.subject)] + ([(after_verb, clause.object)] if clause.object else [])


def _wrong_article(rng: random.Random, clause: Clause, language: str) -> str | None:
    words = clause_words(clause, language)
    at, phrase = rng.choice(_phrases(clause, language))
    if language == "es":
        words[at] = article("es", phrase.definite, phrase.plural, not phrase.noun.feminine, "")
    elif not phrase.definite and not phrase.plural:
        words[at] = "a" if words[at] == "an" else "an"
    else:
        return None
    return sentence(words)


def _wrong_adjective(rng: random.Random, clause: Clause, language: str) -> str | None:
    candidates = [(at, phrase) for at, phrase in _phrases(clause, language) if phrase.adjective]
    if not candidates:
        return None
    at, phrase = rng.choice(candidates)
    assert phrase.adjective is not None
    words = clause_words(clause, language)
    if language == "es":
        flip_gender = rng.random() < 0.5
        words[at + 2] = phrase.adjective.form(
            "es", phrase.plural != (not flip_gender), phrase.noun.feminine != flip_gender
        )
    else:  # English adjectives do not agree: learners add the -s
        if not phrase.plural:
            return None
        words[at + 1] += "s"
    return sentence(words)


def _wrong_order(rng: random.Random, clause: Clause, language: str) -> str | None:
    candidates = [at for at, phrase in _phrases(clause, language) if phrase.adjective]
    if not candidates or language == "es":  # Spanish allows both orders: no mistake
        return None
    at = rng.choice(candidates)
    words = clause_words(clause, language)
    words[at + 1], words[at + 2] = words[at + 2], words[at + 1]
    return sentence(words)


def _doubled_word(rng: random.Random, clause: Clause, language: str) -> str | None:
    words = clause_words(clause, language)
    at = rng.randrange(len(words))
    return sentence([*words[: at + 1], *words[at:]])


def _no_capital_or_stop(rng: random.Random, clause: Clause, language: str) -> str | None:
    text = write(clause, language)
    return rng.choice((text[0].lower() + text[1:], text[:-1], text[0].lower() + text[1:-1]))


Wrong = Callable[[random.Random, Clause, str], str | None]
MISTAKES: tuple[Wrong, ...] = (
    _wrong_verb,
    _wrong_article,
    _wrong_adjective,
    _wrong_order,
    _doubled_word,
    _no_capital_or_stop,
)


# the embedded base leaves out doubled words by itself, so the demo has nothing to teach there
TAUGHT = tuple(mistake for mistake in MISTAKES if mistake is not _doubled_word)


def corrupt(
    rng: random.Random, clause: Clause, language: str, mistakes: Sequence[Wrong] = MISTAKES
) -> str:
    """The clause written with one of `mistakes`; never equal to the correct sentence."""
    right = write(clause, language)
    while True:
        wrong = rng.choice(mistakes)(rng, clause, language)
        if wrong is not None and wrong != right:
            return wrong


@dataclass
class Story:
    """A few sentences about one subject."""

    clauses: list[Clause] = field(default_factory=list)

    @classmethod
    def draw(cls, rng: random.Random, length: int) -> "Story":
        """`length` clauses that share their subject and tense."""
        first = draw_clause(rng)
        subject = replace(first.subject, definite=True)
        rest = [
            replace(draw_clause(rng, subject=subject), past=first.past) for _ in range(length - 1)
        ]
        return cls([first, *rest])

    def write(self, language: str) -> str:
        """The story as text."""
        return " ".join(write(clause, language) for clause in self.clauses)

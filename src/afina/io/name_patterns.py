"""The one matcher of patterns from outside: names of modules, and regular expressions over paths.

PEFT's `rank_pattern` and `alpha_pattern` and the target expressions of users are regular
expressions. Python's own engine backtracks, and a pattern such as `(a+)+$` takes exponential time.
`NamePattern` follows all alternatives at once instead: at most (nodes of the pattern) x (characters
of the path) positions, whatever the pattern.
"""

import re
from collections.abc import Mapping
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from afina.errors import AfinaError

MAX_PATTERN = 4096  # characters
MAX_REPEAT = 1024  # of a counted repetition, {m,n}
MAX_NESTING = 64  # of groups
MAX_NODES = 20_000  # of a pattern once its counted repetitions are written out

# the audit's narrower form: names, dots, .* and \d+
REPETITIONS = (".*", r"\d+")
PLAIN = re.compile(r"\^?(\.\*|\\d\+|[\w\-]|\\?\.)+\$?")
LITERAL = re.compile(r"([\w\-]|\\?\.)+")
MAX_WILD_PATTERNS = 8  # in one table
MAX_LITERAL_FORMS = 512  # in one table: lengths and wildcard positions
MAX_PLAIN_LENGTH = 256  # characters of one pattern

LiteralForm = tuple[int, tuple[int, ...]]  # length, positions that match any character
Ends = frozenset[int]


def is_plain_pattern(text: Any, max_repetitions: int = 2) -> bool:
    r"""Return whether a pattern is a name, with at most `max_repetitions` of `.*` and `\d+`."""
    if not isinstance(text, str) or len(text) > MAX_PLAIN_LENGTH:
        return False
    if PLAIN.fullmatch(text) is None:
        return False
    return sum(text.count(each) for each in REPETITIONS) <= max_repetitions


def are_plain_patterns(patterns: Mapping[str, Any]) -> bool:
    """Return whether a table has only plain patterns: many paths of a few forms, few others."""
    literal = {text for text in patterns if LITERAL.fullmatch(text)}
    num_wild = len(patterns) - len(literal)
    num_forms = len({_literal_form(text)[0] for text in literal})
    is_small = num_wild <= MAX_WILD_PATTERNS and num_forms <= MAX_LITERAL_FORMS
    return is_small and all(is_plain_pattern(text, 1) for text in patterns)


class NamePattern:
    """A regular expression over paths that is matched in bounded time.

    Groups, alternatives, classes, repetitions, anchors and lookaheads are supported;
    backreferences, lookbehinds, flags and word boundaries are not.
    """

    def __init__(self, text: str, where: str, error: type[AfinaError]) -> None:
        """Parse `text`; raise `error`, naming `where`, where it is no such expression."""
        if len(text) > MAX_PATTERN:
            what = f"a pattern of {len(text):,} characters"
            raise error(what, where=where, why=f"at most {MAX_PATTERN:,} are read")
        try:
            parsed = _parser.parse(text)
        except (re.error, RecursionError, OverflowError) as cause:
            hint = "a name, or a regular expression: .*_proj rather than *_proj"
            what = f"{text[:80]!r} is not a regular expression"
            raise error(what, where=where, why=str(cause)[:200], hint=hint) from None
        why = _unsupported(parsed)
        if why is None and parsed.state.flags & ~re.UNICODE:
            why = "flags"
        if why is not None:
            what = f"{text[:80]!r} has {why}, which patterns of names do not have"
            raise error(what, where=where)
        self._nodes = list(parsed)

    def fullmatch(self, path: str) -> bool:
        """Return whether the pattern matches all of `path`."""
        return len(path) in _Matcher(path).sequence(self._nodes, frozenset([0]))

    def matches_end(self, path: str) -> bool:
        """Return whether the pattern matches the end of `path`, from a dot or the start on.

        This is PEFT's rule, `re.match(rf"(.*\\.)?({pattern})$", path)`; `$` is the path's end.
        """
        starts = frozenset([0, *(n + 1 for n, character in enumerate(path) if character == ".")])
        return len(path) in _Matcher(path).sequence(self._nodes, starts)


def _unsupported(nodes: Any) -> str | None:
    """Return what of a parsed pattern the matcher does not support, or None."""
    todo, num_nodes = [(nodes, 1, 0)], 0
    while todo:
        items, factor, depth = todo.pop()
        if depth > MAX_NESTING:
            return "groups nested too deeply"
        for op, value in items:
            num_nodes += factor
            if num_nodes > MAX_NODES:
                return "too many repetitions"
            if op in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
                low, high, inner = value
                bound = low if high is _constants.MAXREPEAT else high
                if bound > MAX_REPEAT:
                    return "too many repetitions"
                todo.append((inner, factor * max(1, bound), depth + 1))
            elif op is _constants.SUBPATTERN:
                if value[1] or value[2]:
                    return "flags"
                todo.append((value[3], factor, depth + 1))
            elif op is _constants.BRANCH:
                todo += [(branch, factor, depth + 1) for branch in value[1]]
            elif op in (_constants.ASSERT, _constants.ASSERT_NOT):
                if value[0] != 1:
                    return "a lookbehind"
                todo.append((value[1], factor, depth + 1))
            elif op is _constants.AT:
                if value not in ANCHORS:
                    return "a word boundary"
            elif op not in CHARACTER_OPS:
                return f"{str(op).lower()}"
    return None


ANCHORS = (
    _constants.AT_BEGINNING,
    _constants.AT_BEGINNING_STRING,
    _constants.AT_END,
    _constants.AT_END_STRING,
)
CHARACTER_OPS = (
    _constants.LITERAL,
    _constants.NOT_LITERAL,
    _constants.ANY,
    _constants.IN,
)
CATEGORIES = {
    _constants.CATEGORY_DIGIT: str.isdecimal,
    _constants.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    _constants.CATEGORY_SPACE: str.isspace,
    _constants.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    _constants.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    _constants.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


class _Matcher:
    """Positions that the nodes of a pattern reach in one path; each node and start once."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._known: dict[tuple[int, Ends], Ends] = {}

    def sequence(self, nodes: Any, starts: Ends) -> Ends:
        """Return where a sequence of nodes may end, of all `starts`."""
        for node in nodes:
            if not starts:
                break
            starts = self._ends(node, starts)
        return starts

    def _ends(self, node: Any, starts: Ends) -> Ends:
        key = (id(node), starts)
        if key not in self._known:
            self._known[key] = self._compute(node, starts)
        return self._known[key]

    def _compute(self, node: Any, starts: Ends) -> Ends:
        op, value = node
        if op is _constants.SUBPATTERN:
            return self.sequence(value[3], starts)
        if op is _constants.BRANCH:
            return frozenset().union(*(self.sequence(branch, starts) for branch in value[1]))
        if op in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
            low, high, nodes = value
            return self._repeat(low, high, nodes, starts)
        if op in (_constants.ASSERT, _constants.ASSERT_NOT):
            wanted = op is _constants.ASSERT
            found = (s for s in starts if bool(self.sequence(value[1], frozenset([s]))) is wanted)
            return frozenset(found)
        if op is _constants.AT:
            at_start = value in (_constants.AT_BEGINNING, _constants.AT_BEGINNING_STRING)
            return starts & {0 if at_start else len(self.path)}
        inside = (s for s in starts if s < len(self.path))
        return frozenset(s + 1 for s in inside if _fits(op, value, self.path[s]))

    def _repeat(self, low: int, high: Any, nodes: Any, starts: Ends) -> Ends:
        """Follow a repetition; beyond its minimum, each position is extended once."""
        for _ in range(low):
            starts = self.sequence(nodes, starts)
        found = new = starts
        rounds = len(self.path) + 1 if high is _constants.MAXREPEAT else high - low
        for _ in range(rounds):
            new = self.sequence(nodes, new) - found
            if not new:
                break
            found |= new
        return found


def _fits(op: Any, value: Any, character: str) -> bool:
    """Return whether one character matches a node of one character."""
    if op is _constants.LITERAL:
        return ord(character) == value
    if op is _constants.NOT_LITERAL:
        return ord(character) != value
    if op is _constants.ANY:
        return character != "\n"
    is_negated = bool(value) and value[0][0] is _constants.NEGATE
    for kind, item in value[1:] if is_negated else value:
        if kind is _constants.LITERAL:
            hit = ord(character) == item
        elif kind is _constants.RANGE:
            hit = item[0] <= ord(character) <= item[1]
        else:
            hit = CATEGORIES[item](character)
        if hit:
            return not is_negated
    return is_negated


def _literal_form(text: str) -> tuple[LiteralForm, str]:
    """Return the form of a pattern without repetitions, and its characters (a dot matches any)."""
    characters = re.findall(r"\\?.", text)
    wild = tuple(n for n, character in enumerate(characters) if character == ".")
    return (len(characters), wild), "".join(character[-1] for character in characters)


class PatternTable:
    """PEFT's table of patterns with values; the first pattern that matches a path's end wins.

    Patterns without a repetition, nearly all, are looked up by the path's last characters: 5,000 of
    them cost what 5 do.
    """

    def __init__(self, patterns: Mapping[str, Any], where: str, error: type[AfinaError]) -> None:
        """Parse the patterns; raise `error`, naming `where`, where one is not supported."""
        self._literal: dict[LiteralForm, dict[str, tuple[int, Any]]] = {}
        self._wild: list[tuple[int, NamePattern, Any]] = []
        for number, (text, value) in enumerate(patterns.items()):
            if LITERAL.fullmatch(text):
                form, characters = _literal_form(text)
                self._literal.setdefault(form, {}).setdefault(characters, (number, value))
            else:
                self._wild.append((number, NamePattern(text, where, error), value))

    def get(self, path: str, default: Any = None) -> Any:
        """Return the value of the first pattern that matches the end of `path`."""
        found = [(n, value) for n, pattern, value in self._wild if pattern.matches_end(path)]
        for (length, wild), table in self._literal.items():
            if len(path) == length or (len(path) > length and path[-length - 1] == "."):
                end = list(path[len(path) - length :])
                for position in wild:
                    end[position] = "."
                hit = table.get("".join(end))
                if hit is not None:
                    found.append(hit)
        return min(found, key=lambda item: item[0])[1] if found else default

"""Validation errors as sentences: which parameter, what was found, what is accepted.

pydantic reports one error for each member of a union and for each step inside it. Here the errors
of one field become one sentence, of the field that matched furthest, without pydantic's terms.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from afina.errors import did_you_mean

Path = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)

# by pydantic's error type: what is accepted
ACCEPTED = {
    "string_type": "a text",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "a smaller integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dataclass_type": "an object",
    "none_required": "null",
}
# by pydantic's error type: a clause, with the values of its context
BOUNDS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
}


def invalid(param: str, message: str) -> PydanticCustomError:
    """Return an error to raise in a validator.

    Args:
        param: name relative to the field of the validator; "" in the validator of a field.
        message: a sentence that names the parameter.
    """
    return PydanticCustomError("afina", "{message}", {"message": message, "param": param})


def check_known(names: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Raise for the first name, of the object at `where`, that is not among the known ones."""
    known = list(known)
    for name in names:
        if name not in known:
            hint = did_you_mean(str(name), known) if len(str(name)) <= 100 else ""
            hint = hint if hint.startswith("did") else ""
            shown = str(name)[:100]
            param = f"{where}.{shown}" if where else shown
            raise invalid(param, f"unknown parameter {shown!r}" + (f"; {hint}" if hint else ""))


def validate(kind: type[Model], values: Any, names: Mapping[str, str] | None = None) -> Model:
    """Return `values` as a request of another kind.

    Args:
        names: parameters of that kind, by the names that the client knows.

    Raises:
        PydanticCustomError: the first invalid field, under the client's name.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        errors = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        message, param = describe_errors(errors, values)
        for own, theirs in (names or {}).items():
            if re.match(rf"{own}\b", param):
                message, param = message.replace(own, theirs), theirs + param[len(own) :]
        raise invalid(param, message) from None


def describe_errors(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str]:
    """Return (sentence, parameter) of the first invalid field of a request.

    Args:
        errors: pydantic's errors, whose locations begin with "body", "query", "path" or "header".
        body: the parsed body.
    """
    located = [(_real_path(error, body), error) for error in errors]
    first = located[0][0]
    # the members of a union report at the same field or within it
    same = [(p, e) for p, e in located if p[: len(first)] == first or first[: len(p)] == p]
    own = [(p, e) for p, e in same if e["type"] == "afina"]
    depth = max(len(path) for path, _ in own or same)
    path = next(path for path, _ in own or same if len(path) == depth)
    here = [error for p, error in own or same if p == path]
    if own:
        given = here[0]["ctx"]
        param = format_path((*path, given["param"]) if given["param"] else path)
        return str(given["message"]), param
    where = format_path(path)
    return _sentence(where, here), where or str(here[0]["loc"][0])


def format_path(path: Path) -> str:
    """Return a path in OpenAI's notation: messages[0].content."""
    text = ""
    for part in path:
        is_index = isinstance(part, int)
        part = f"[{part}]" if is_index else str(part)
        text += part if not text or part.startswith("[") else f".{part}"
    return text


def _real_path(error: Mapping[str, Any], body: Any) -> Path:
    """Return the location without the names of union members, which are not in the body."""
    source, *rest = error["loc"]
    if source != "body":
        return tuple(rest)
    path: list[str | int] = []
    value = body
    for n, part in enumerate(rest):
        is_key = isinstance(value, Mapping) and part in value
        is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_key or is_index:
            value = value[part]
        elif error["type"] != "missing" or n < len(rest) - 1:
            continue
        path.append(part)
    return tuple(path)


def _sentence(where: str, errors: Sequence[Mapping[str, Any]]) -> str:
    first = errors[0]
    kind, context = first["type"], first.get("ctx", {})
    if kind == "json_invalid":
        return f"the body is not valid JSON: {context.get('error', 'syntax error')}"
    if not where:
        if kind == "missing":
            return "the body is missing: a JSON object is expected"
        return "the body must be a JSON object (content-type: application/json)"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "extra_forbidden":
        return f"unknown parameter {where!r}"
    if kind in BOUNDS:
        return f"{where} {BOUNDS[kind].format(**context)}; found {describe_value(first['input'])}"
    accepted = [_accepted(error) for error in errors]
    unique = [text for n, text in enumerate(accepted) if text and text not in accepted[:n]]
    if not unique:
        return f"{where} is not valid; found {describe_value(first['input'])}"
    wanted = ", ".join(unique[:-1]) + (" or " if unique[:-1] else "") + unique[-1]
    return f"{where} must be {wanted}; found {describe_value(first['input'])}"


def _accepted(error: Mapping[str, Any]) -> str | None:
    if error["type"] in ("literal_error", "enum"):
        return str(error["ctx"]["expected"])
    return ACCEPTED.get(error["type"])


def describe_value(value: Any) -> str:
    """Return a short description of a JSON value: its kind, and its value where it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {str(value)[:40]}"
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 40 else f"a text of {len(value):,} characters"
    if isinstance(value, Mapping):
        return f"an object ({', '.join(map(str, list(value)[:4]))[:80]})" if value else "{}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value):,}"
    return "a value of another kind"

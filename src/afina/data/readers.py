"""The bytes of a file become records, each with its place: JSON, JSONL, CSV, Parquet, plain text.

A reader yields (where, record); a record that cannot be read is yielded as its `DataError`, so that the
caller may stop at it or leave it out. A fault of the whole file is raised.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from afina.data.rows import kind_of
from afina.errors import DataError, pluralize

Records = Iterator[tuple[str, dict[str, Any] | DataError]]

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")
DELIMITERS = ",\t;|"


def decode(path: Path, data: bytes) -> str:
    """The text of a UTF-8 file without its byte order mark; raises `DataError` with the line on anything else."""
    if data[:2] == b"\x1f\x8b":
        raise DataError("the file is compressed", where=str(path), hint=f"gunzip {path}")
    if b"\0" in data:
        kind = "UTF-16 text" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "a binary file"
        raise DataError(
            f"{kind} cannot be read", where=str(path), hint="JSONL, CSV, text in UTF-8, or Parquet"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        hint = f"iconv -f LATIN1 -t UTF-8 {path} > utf8{path.suffix}  (if it is Latin-1)"
        raise DataError(
            "not UTF-8 text", where=f"{path}:{line}", why=str(error), hint=hint
        ) from None


def looks_like_json(path: Path, text: str) -> bool:
    """Whether the text begins as JSON does, or its name says that it has to be JSON."""
    return path.suffix.lower() in JSON_SUFFIXES or bool(
        re.match(r"\s*(\[\s*[{\[\]\"]|\{\s*[\"}])", text)
    )


def _object(where: str, value: Any) -> dict[str, Any] | DataError:
    if isinstance(value, dict):
        return value
    return DataError(f"expected an object {{...}}, found {kind_of(value)}", where=where)


def _broken(path: Path, line: int, error: Exception) -> DataError:
    what = (
        f"{error.msg} (column {error.colno})"
        if isinstance(error, json.JSONDecodeError)
        else str(error)
    )
    return DataError(
        f"broken JSON: {what}",
        where=f"{path}:{line}",
        hint="one object a line, or a list of objects",
    )


def read_json(path: Path, text: str) -> Records:
    """A JSON list of objects, or one object a line (JSONL), or a single object over several lines."""
    if text.lstrip().startswith("["):
        yield from _read_list(path, text)
        return
    lines = text.split("\n")  # not splitlines: that would cut at the U+2028 inside a string
    try:
        whole = None if _parses(next(line for line in lines if line.strip())) else json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, dict):
        yield f"{path}:row 1", whole
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, _object(where, json.loads(line))
        except (ValueError, RecursionError) as error:
            yield where, _broken(path, number, error)


def _parses(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_list(path: Path, text: str) -> Records:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(path, getattr(error, "lineno", 1), error) from None
    for number, value in enumerate(values, 1):
        where = f"{path}:row {number}"
        yield where, _object(where, value)


def delimiter(path: Path, text: str, known: Callable[[list[str]], bool]) -> str | None:
    """What separates the fields of a CSV file whose header is `known`; None when the text is no such file.

    A file named .csv or .tsv is one whatever its header says: the error about its columns comes later.
    """
    header = text.lstrip("\r\n").split("\n", 1)[0].rstrip("\r")
    fields = {mark: next(csv.reader([header], delimiter=mark), []) for mark in DELIMITERS}
    for mark, names in fields.items():
        if len(names) > 1 and known(names):
            return mark
    if path.suffix.lower() not in CSV_SUFFIXES:
        return None
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max(fields, key=lambda mark: len(fields[mark]))


def read_csv(path: Path, text: str, mark: str) -> Records:
    """CSV or TSV with a header line; a field may hold line breaks when it is quoted."""
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KB is less than a long document
    try:
        (first, header), *lines = _csv_lines(path, text, mark)
    finally:
        csv.field_size_limit(limit)
    if len(set(header)) < len(header):
        raise DataError(
            "two columns have the same name", where=f"{path}:{first}", why=", ".join(header)
        )
    for number, fields in lines:
        where = f"{path}:{number}"
        if len(fields) > len(header):
            yield (
                where,
                DataError(
                    f"{pluralize(len(fields), 'field')}, the header has {len(header)}", where=where
                ),
            )
        else:
            yield where, dict(zip(header, fields, strict=False))


def _csv_lines(path: Path, text: str, mark: str) -> list[tuple[int, list[str]]]:
    """The lines that are not blank, each with the number at which it begins; raises `DataError`.

    Most TSV files know no quotes (those of GLUE begin fields with a bare one): where reading with quotes fails
    or gives uneven lines, a tab-separated file is read without.
    """
    try:
        lines = _split_fields(path, text, mark, csv.QUOTE_MINIMAL)
        even = len({len(fields) for _, fields in lines}) == 1
    except DataError:
        if mark != "\t":
            raise
        even = False
    return lines if even or mark != "\t" else _split_fields(path, text, mark, csv.QUOTE_NONE)


def _split_fields(path: Path, text: str, mark: str, quoting: Any) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, quoting=quoting, strict=True)
    lines: list[tuple[int, list[str]]] = []
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return lines
        except (
            csv.Error
        ) as error:  # nobody knows where the next row begins, so this one cannot be left out alone
            hint = "put the field in double quotes, and write a quote inside it twice"
            raise DataError(f"broken CSV: {error}", where=f"{path}:{start}", hint=hint) from None
        if fields:
            lines.append((start, fields))


def read_parquet(path: Path, data: bytes) -> Records:
    """The rows of a Parquet file; raises `DataError` when pyarrow is missing or the file is damaged."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        hint = 'pip install "afina[parquet]"'
        raise DataError("a Parquet file needs pyarrow", where=str(path), hint=hint) from None
    try:
        values = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("the Parquet file is damaged", where=str(path), why=str(error)) from None
    for number, value in enumerate(values, 1):
        yield f"{path}:row {number}", value


BREAK = re.compile(r"\n[ \t\r]*\f[ \t\r]*(?=\n|$)|\n(?:[ \t\r]*\n){2,}")


def read_text(path: Path, text: str) -> Records:
    """Plain text: documents apart by a line with a form feed or by two or more blank lines; or one document."""
    start, line = 0, 1
    for end, following in [
        *(match.span() for match in BREAK.finditer(text)),
        (len(text), len(text)),
    ]:
        document = text[start:end]
        if document.strip():
            blank = len(document) - len(document.lstrip())
            yield (
                f"{path}:{line + document.count(chr(10), 0, blank)}",
                {"text": document.strip("\r\n\f")},
            )
        line += text.count("\n", start, following)
        start = following

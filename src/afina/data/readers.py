"""Readers of JSON, JSONL, CSV, TSV, Parquet, XLSX, plain text and CoNLL: a file to its records.

A reader yields `(where, record)`. JSONL, CSV, Parquet and CoNLL are read piece by piece; of a JSON
list and of plain text the text is in memory, and one record at a time. A record that cannot be read
is yielded as its `DataError`, so that the caller can raise it or leave the record out; a fault of
the complete file is raised.
"""

import csv
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from afina.data.columns import kind_of
from afina.data.input_file import PARQUET_MAGIC, ZIP_MAGIC, InputFile
from afina.errors import DataError, pluralize

Record = tuple[str, dict[str, Any] | DataError]
Records = Iterator[Record]

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
# texts whose marks would be learned with them
MARKUP_SUFFIXES = (".yaml", ".yml", ".toml", ".xml", ".html", ".htm", ".rtf")
CSV_SUFFIXES = (".csv", ".tsv")
CONLL_SUFFIXES = (".conll", ".bio", ".iob", ".iob2", ".bioes")  # a word and its tag a line
DELIMITERS = ",\t;|"
PARQUET_ROWS = 64  # rows of a Parquet file that are in memory at once
MAX_CSV_FIELD = 2**31 - 1  # characters; csv's default of 128 KB is less than a long document


def read_records(
    file: InputFile,
    is_header: Callable[[list[str]], bool],
    is_row: Callable[[list[str]], bool],
    text_is_lines: bool = False,
) -> Records:
    """Return the records of a file, by the reader that fits its content.

    The ending of the name decides only about what would otherwise be plain text: a .jsonl file that
    is not JSON is an error.

    Args:
        file: The file.
        is_header: Whether these names, the first line of a text, are the header of a CSV file.
        is_row: Whether a JSON object with these keys is a row, and does not hold rows.
        text_is_lines: Plain text has one prompt per line, and is never taken for CSV.
    """
    path, suffix = file.path, file.path.suffix.lower()
    if file.head.startswith(PARQUET_MAGIC):
        return read_parquet(path)
    if file.head.startswith(ZIP_MAGIC):
        return read_xlsx(path)
    if suffix == ".parquet":
        why = f"it does not begin with {PARQUET_MAGIC.decode()}"
        raise DataError("not a Parquet file", where=str(path), why=why)
    if looks_like_json(path, file.start):
        return read_json(file, is_row)
    if suffix in CONLL_SUFFIXES:
        return read_conll(file)
    if text_is_lines and suffix not in CSV_SUFFIXES:
        return read_lines(path, file.text())
    if suffix in MARKUP_SUFFIXES:
        hint = f"its rows as JSONL or CSV; as plain text, marks and all: cp {path} {path.stem}.txt"
        raise DataError(f"{suffix[1:]} files are not read", where=str(path), hint=hint)
    delimiter = find_delimiter(file, is_header)
    return read_text(path, file.text()) if delimiter is None else read_csv(file, delimiter)


def looks_like_json(path: Path, text: str) -> bool:
    """Return whether a text begins as JSON does, or its name ends as a JSON file's."""
    begins = re.match(r"\s*(\[\s*[{\[\]\"]|\{\s*[\"}])", text)
    return path.suffix.lower() in JSON_SUFFIXES or begins is not None


def read_json(file: InputFile, is_row: Callable[[list[str]], bool]) -> Records:
    """Yield the objects of a JSON list, of a file with one object per line, or of one object.

    One object is a row, or holds rows: as a list below one of its keys, or as objects by an id.

    Args:
        file: The file.
        is_row: Whether an object with these keys is a row.
    """
    path = file.path
    lines = ((n, line) for n, line in enumerate(file.lines(), 1) if line.strip())
    start, first = next(lines)
    is_line = next(lines, None) is None
    is_jsonl = not is_line and _parse_or_none(first) is not None
    if first.lstrip().startswith("[") and not is_jsonl:
        yield from _read_list(path, file.text())
        return
    # an object in one line, or one that begins in it
    single = None if is_jsonl else _parse_or_none(file.text())
    if isinstance(single, dict):
        where = f"{path}:{start}" if is_line else f"{path}:row 1"
        yield from _rows_of_object(path, single, is_row, where)
        return
    for number, line in enumerate(file.lines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, _object(where, _loads(line))
        except (ValueError, RecursionError) as error:
            yield where, _broken_json(path, number, error)


def _rows_of_object(
    path: Path, value: dict[str, Any], is_row: Callable[[list[str]], bool], where: str
) -> Records:
    """Yield the rows that an object holds, or the object as the row at `where`."""
    lists = {key: items for key, items in value.items() if _is_list_of_rows(items)}
    objects = [item for item in value.values() if isinstance(item, dict)]
    shared = set.intersection(*map(set, objects)) if objects else set()
    if not is_row(list(value)) and len(lists) == 1:
        key, items = next(iter(lists.items()))
        for number, item in enumerate(items, 1):
            yield f"{path}:{key}:row {number}", item
    elif not is_row(list(value)) and len(lists) > 1:
        first, names = next(iter(lists)), ", ".join(lists)
        hint = f"one file for each: jq -c '.{first}[]' {path} > {first}.jsonl"
        raise DataError(f"rows below several keys: {names}", where=str(path), hint=hint)
    elif not is_row(list(value)) and len(objects) == len(value) and shared:
        for key, item in value.items():
            yield f"{path}:{key}", item
    else:
        yield where, value


def _is_list_of_rows(value: Any) -> bool:
    """Return whether a value is a list of objects that are not the turns of a chat."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, dict) and not {"role", "from"} & item.keys() for item in value)


class DuplicateKeyError(ValueError):
    """Two keys of an object are equal: one of two values would be lost."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; raises `DuplicateKeyError`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise DuplicateKeyError(f"two values have the key {twice!r}")
    return found


_loads = json.JSONDecoder(object_pairs_hook=_unique).decode


def _parse_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_list(path: Path, text: str) -> Records:
    """Yield the items of a list, of which one at a time is in memory with the text."""
    decode = json.JSONDecoder(object_pairs_hook=_unique).raw_decode
    separator, number = re.compile(r"\s*([,\]])\s*"), 0
    at = next(re.finditer(r"\s*\[\s*", text)).end()
    is_end = text.startswith("]", at)
    try:
        while not is_end:
            value, at = decode(text, at)
            number += 1
            where = f"{path}:row {number}"
            yield where, _object(where, value)
            found = separator.match(text, at)
            if found is None:
                raise ValueError
            is_end, at = found[1] == "]", found.end()
        if number and at < len(text):
            raise ValueError
    except (ValueError, RecursionError) as error:
        raise _broken_list(path, text, error) from None


def _broken_list(path: Path, text: str, error: Exception) -> DataError:
    """Return the error of a list that is broken somewhere, with its line."""
    try:
        _loads(text)
    except (ValueError, RecursionError) as found:
        error = found
    return _broken_json(path, getattr(error, "lineno", 1), error)


def _object(where: str, value: Any) -> dict[str, Any] | DataError:
    if isinstance(value, dict):
        return value
    return DataError(f"expected an object {{...}}, found {kind_of(value)}", where=where)


def _broken_json(path: Path, line: int, error: Exception) -> DataError:
    what = str(error)
    if isinstance(error, DuplicateKeyError):
        return DataError(what, where=f"{path}:{line}", hint="one of the two under another name")
    if isinstance(error, json.JSONDecodeError):
        what = f"{error.msg} (column {error.colno})"
    hint = "one object per line, or a list of objects"
    return DataError(f"broken JSON: {what}", where=f"{path}:{line}", hint=hint)


def find_delimiter(file: InputFile, is_header: Callable[[list[str]], bool]) -> str | None:
    """Return what separates the fields of a CSV file; None where the text is no such file.

    A file named .csv or .tsv is one whatever its header is: the error about its columns comes
    later.
    """
    header = next((line for line in file.lines() if line.strip("\r\n")), "").strip("\r")
    fields = {mark: next(csv.reader([header], delimiter=mark), []) for mark in DELIMITERS}
    header_mark = next(
        (m for m, names in fields.items() if len(names) > 1 and is_header(names)), None
    )
    if header_mark is not None:
        return header_mark
    suffix = file.path.suffix.lower()
    if suffix == ".tsv":
        return "\t"
    return max(fields, key=lambda mark: len(fields[mark])) if suffix in CSV_SUFFIXES else None


def read_csv(file: InputFile, delimiter: str) -> Records:
    """Yield the rows of CSV or TSV with a header line; a quoted field may hold line breaks."""
    path, lines = file.path, _csv_lines(file, delimiter)
    first, header = next(lines)
    header = [name.strip() for name in header]
    if len(set(header)) < len(header):
        where, why = f"{path}:{first}", ", ".join(header)
        raise DataError("two columns have the same name", where=where, why=why)
    for number, fields in lines:
        where = f"{path}:{number}"
        if len(fields) > len(header):
            what = f"{pluralize(len(fields), 'field')}, the header has {len(header)}"
            yield where, DataError(what, where=where)
        else:
            yield where, dict(zip(header, fields, strict=False))


def _csv_lines(file: InputFile, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Return the lines that are not blank, each with the number at which it begins.

    Most TSV files do not quote (those of GLUE begin fields with a bare quote): where reading with
    quotes fails or gives lines of unequal length, a tab-separated file is read without.
    """
    quoted = _split_fields(file, delimiter, csv.QUOTE_MINIMAL)
    if delimiter != "\t" or _is_even(quoted):
        return _split_fields(file, delimiter, csv.QUOTE_MINIMAL)
    return _split_fields(file, delimiter, csv.QUOTE_NONE)


def _is_even(lines: Iterator[tuple[int, list[str]]]) -> bool:
    """Return whether lines can be read, and have the same number of fields."""
    try:
        return len({len(fields) for _, fields in lines}) == 1
    except DataError:
        return False


def _split_fields(file: InputFile, delimiter: str, quoting: Any) -> Iterator[tuple[int, list[str]]]:
    with file.open_text() as stream:
        reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)
        while True:
            start, limit = reader.line_num + 1, csv.field_size_limit(MAX_CSV_FIELD)
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # where the next row begins is unknown: none to leave out
                where, hint = f"{file.path}:{start}", "put the field in double quotes, and write"
                hint += " a quote inside it twice"
                raise DataError(f"broken CSV: {error}", where=where, hint=hint) from None
            finally:
                csv.field_size_limit(limit)
            if fields:
                yield start, fields


def read_parquet(path: Path) -> Records:
    """Yield the rows of a Parquet file; raises `DataError` without pyarrow or if it is damaged."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        hint = 'pip install "afina[parquet]"'
        raise DataError("a Parquet file needs pyarrow", where=str(path), hint=hint) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", value
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("the Parquet file is damaged", where=str(path), why=str(error)) from None


def read_xlsx(path: Path) -> Records:
    """Yield the rows of an XLSX file with one filled sheet, whose first row has the names.

    Raises:
        DataError: openpyxl is missing, the file is damaged or another archive, or several sheets
            have rows.
    """
    try:
        import openpyxl  # type: ignore[import-untyped]
    except ImportError:
        hint = 'pip install "afina[xlsx]", or save the sheet as CSV'
        raise DataError("an XLSX file needs openpyxl", where=str(path), hint=hint) from None
    try:
        with path.open("rb") as file:
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
            sheets = {s.title: list(s.iter_rows(values_only=True)) for s in book.worksheets}
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        what = "not an XLSX file, or a damaged one"
        raise DataError(what, where=str(path), why=str(error), hint="unpack an archive") from None
    filled = {name: rows for name, rows in sheets.items() if any(any(_cells(r)) for r in rows)}
    if len(filled) != 1:
        what, hint = f"{len(filled)} sheets have rows: {', '.join(filled)}", "one sheet a file"
        raise DataError(what, where=str(path), hint=hint)
    rows = next(iter(filled.values()))
    header = [str(name) if name is not None else "" for name in rows[0]]
    for number, row in enumerate(rows[1:], 2):
        cells = _cells(row)
        if any(cell not in (None, "") for cell in cells):
            named = zip(header, cells, strict=False)
            yield f"{path}:row {number}", {name: cell for name, cell in named if name}


def _cells(row: Sequence[Any]) -> list[Any]:
    """Return the values of cells; a date as text."""
    return [cell.isoformat() if hasattr(cell, "isoformat") else cell for cell in row]


# two or more blank lines, or a line with a form feed
DOCUMENT_BREAK = re.compile(r"\n[ \t\r]*\f[ \t\r]*(?=\n|$)|\n(?:[ \t\r]*\n){2,}")


def read_text(path: Path, text: str) -> Records:
    """Yield the documents of plain text, separated by two blank lines or by a form feed."""
    start, line = 0, 1
    breaks = [match.span() for match in DOCUMENT_BREAK.finditer(text)]
    for end, next_start in [*breaks, (len(text), len(text))]:
        document = text[start:end]
        if document.strip():
            blank = len(document) - len(document.lstrip())
            first_line = line + document.count("\n", 0, blank)
            yield f"{path}:{first_line}", {"text": document.strip("\r\n\f")}
        line += text.count("\n", start, next_start)
        start = next_start


def read_lines(path: Path, text: str) -> Records:
    """Yield each line of plain text that is not blank, as a prompt."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"{path}:{number}", {"prompt": line.strip()}


def read_conll(file: InputFile) -> Records:
    """Yield the sentences of a CoNLL file: words of the first column, tags of the last.

    A line has one word, a blank line ends a sentence. Lines of -DOCSTART- and comments, which begin
    with # and have another number of columns than the first word, are no words.
    """
    path, words = file.path, list[tuple[str, str]]()
    start, columns, broken = 1, 0, None
    for number, line in enumerate(chain(file.lines(), [""]), 1):
        fields = line.split()
        if not fields or fields[0] == "-DOCSTART-":
            if words:
                tokens, tags = (list(column) for column in zip(*words, strict=True))
                yield f"{path}:{start}", broken or {"tokens": tokens, "tags": tags}
            words, broken = [], None
            continue
        if fields[0].startswith("#") and len(fields) != (columns or 2):
            continue
        start, columns = (start if words else number), columns or len(fields)
        if len(fields) != columns or columns < 2:
            what = f"{pluralize(len(fields), 'column')}, expected {max(2, columns)}"
            hint = "a word and its tag, the same number of columns in each line"
            broken = broken or DataError(what, where=f"{path}:{number}", hint=hint)
        words.append((fields[0], fields[-1]))

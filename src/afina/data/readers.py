"""Readers of JSON, JSONL, CSV, TSV, Parquet, XLSX, plain text and image folders: bytes to records.

A reader yields `(where, record)`. A record that cannot be read is yielded as its `DataError`, so
that the caller can raise it or leave the record out; a fault of the complete file is raised.
"""

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from afina.data.columns import kind_of
from afina.errors import DataError, did_you_mean, pluralize

Record = tuple[str, dict[str, Any] | DataError]
Records = Iterator[Record]

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")
CONLL_SUFFIXES = (".conll", ".bio", ".iob", ".iob2", ".bioes")  # a word and its tag a line
DELIMITERS = ",\t;|"
PARQUET_MAGIC, ZIP_MAGIC = b"PAR1", b"PK\x03\x04"  # an XLSX file is a zip archive
# the first bytes of a text in these encodings; UTF-32 first, whose mark begins as that of UTF-16
BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
# ratio of letters beyond ASCII in Western European text: 2 to 5% in Spanish, French and German; in
# Cyrillic or Greek code pages nearly all letters are
MAX_ACCENTED = 0.2
MAX_CSV_FIELD = 2**31 - 1  # characters; csv's default of 128 KB is less than a long document


def read_bytes(path: Path) -> bytes:
    """Return the content of a data file.

    Raises:
        DataError: there is no such file, it is a folder, it cannot be read, or it is empty.
    """
    if path.is_dir():
        hint = "name one file in it, or --objective classify for pictures in folders"
        raise DataError("this is a folder", where=str(path), hint=hint)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        similar = did_you_mean(path.name, siblings) if siblings else None
        raise DataError("no such file", where=str(path), hint=similar) from None
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", where=str(path)) from None
    if not data.strip():
        raise DataError("the file is empty", where=str(path))
    return data


def read_records(
    path: Path,
    data: bytes,
    is_header: Callable[[list[str]], bool],
    is_row: Callable[[list[str]], bool],
    text_is_lines: bool = False,
) -> Records:
    """Return the records of a file, by the reader that fits its content.

    The ending of the name decides only about what would otherwise be plain text: a .jsonl file that
    is not JSON is an error.

    Args:
        path: The file, for its ending and for error messages.
        data: Its content.
        is_header: Whether these names, the first line of a text, are the header of a CSV file.
        is_row: Whether a JSON object with these keys is a row, and does not hold rows.
        text_is_lines: Plain text has one prompt per line, and is never taken for CSV.
    """
    suffix = path.suffix.lower()
    if data.startswith(PARQUET_MAGIC):
        return read_parquet(path, data)
    if data.startswith(ZIP_MAGIC):
        return read_xlsx(path, data)
    if suffix == ".parquet":
        why = f"it does not begin with {PARQUET_MAGIC.decode()}"
        raise DataError("not a Parquet file", where=str(path), why=why)
    text = decode(path, data)
    if looks_like_json(path, text):
        return read_json(path, text, is_row)
    if suffix in CONLL_SUFFIXES:
        return read_conll(path, text)
    if text_is_lines and suffix not in CSV_SUFFIXES:
        return read_lines(path, text)
    delimiter = find_delimiter(path, text, is_header)
    return read_text(path, text) if delimiter is None else read_csv(path, text, delimiter)


def decode(path: Path, data: bytes) -> str:
    """Return the text of a file without its byte order mark.

    A text is UTF-8, or UTF-16 or UTF-32 where it begins with their mark; otherwise Windows-1252, if
    it has no valid UTF-8 beyond ASCII and few letters beyond ASCII.

    Raises:
        DataError: the file is compressed, binary, damaged or in another encoding; names the line.
    """
    if data.startswith(b"\x1f\x8b"):
        raise DataError("the file is compressed", where=str(path), hint=f"gunzip {path}")
    encoding = next(
        (name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), None
    )
    if encoding is None and b"\0" in data:
        hint = "JSONL, CSV, text in UTF-8, Parquet, or XLSX"
        raise DataError("a binary file cannot be read", where=str(path), hint=hint)
    try:
        return data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        if encoding is None and is_windows_1252(data):
            return data.decode("cp1252")
        line = data.count(b"\n", 0, error.start) + 1
        hint = f"iconv -f ENCODING -t UTF-8 {path} > utf8{path.suffix}  (iconv -l lists encodings)"
        raise DataError(
            "not UTF-8 text", where=f"{path}:{line}", why=str(error), hint=hint
        ) from None


def is_windows_1252(data: bytes) -> bool:
    """Return whether bytes that are not UTF-8 are Western European text in Windows-1252."""
    if data.isascii() or re.search(
        rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}", data
    ):
        return False  # UTF-8 with damage
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return False
    letters = [letter for letter in text if letter.isalpha()]
    accented = sum(not letter.isascii() for letter in letters)
    control = re.search(r"[\x00-\x08\x0e-\x1f]", text)
    return control is None and 0 < accented <= MAX_ACCENTED * len(letters)


def looks_like_json(path: Path, text: str) -> bool:
    """Return whether a text begins as JSON does, or its name ends as a JSON file's."""
    begins = re.match(r"\s*(\[\s*[{\[\]\"]|\{\s*[\"}])", text)
    return path.suffix.lower() in JSON_SUFFIXES or begins is not None


def read_json(path: Path, text: str, is_row: Callable[[list[str]], bool]) -> Records:
    """Yield the objects of a JSON list, of a file with one object per line, or of one object.

    One object is a row, or holds rows: as a list below one of its keys, or as objects by an id.

    Args:
        path: The file, for error messages.
        text: Its content.
        is_row: Whether an object with these keys is a row.
    """
    if text.lstrip().startswith("["):
        yield from _read_list(path, text)
        return
    single = _single_object(text)
    if single is not None:
        start = 1 + text[: len(text) - len(text.lstrip())].count("\n")
        is_line = "\n" not in text.strip()
        where = f"{path}:{start}" if is_line else f"{path}:row 1"
        yield from _rows_of_object(path, single, is_row, where)
        return
    # not splitlines, which would cut at a U+2028 inside a string
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, _object(where, json.loads(line))
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


def _single_object(text: str) -> dict[str, Any] | None:
    """Return the one object that a file holds; None for JSONL of several lines."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and _parse_or_none(lines[0]) is not None:
        return None
    value = _parse_or_none(text)
    return value if isinstance(value, dict) else None


def _parse_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_list(path: Path, text: str) -> Records:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken_json(path, getattr(error, "lineno", 1), error) from None
    for number, value in enumerate(values, 1):
        where = f"{path}:row {number}"
        yield where, _object(where, value)


def _object(where: str, value: Any) -> dict[str, Any] | DataError:
    if isinstance(value, dict):
        return value
    return DataError(f"expected an object {{...}}, found {kind_of(value)}", where=where)


def _broken_json(path: Path, line: int, error: Exception) -> DataError:
    what = str(error)
    if isinstance(error, json.JSONDecodeError):
        what = f"{error.msg} (column {error.colno})"
    hint = "one object per line, or a list of objects"
    return DataError(f"broken JSON: {what}", where=f"{path}:{line}", hint=hint)


def find_delimiter(path: Path, text: str, is_header: Callable[[list[str]], bool]) -> str | None:
    """Return what separates the fields of a CSV file; None where the text is no such file.

    A file named .csv or .tsv is one whatever its header is: the error about its columns comes
    later.
    """
    header = text.lstrip("\r\n").split("\n", 1)[0].rstrip("\r")
    fields = {mark: next(csv.reader([header], delimiter=mark), []) for mark in DELIMITERS}
    header_mark = next(
        (m for m, names in fields.items() if len(names) > 1 and is_header(names)), None
    )
    if header_mark is not None:
        return header_mark
    suffix = path.suffix.lower()
    if suffix == ".tsv":
        return "\t"
    return max(fields, key=lambda mark: len(fields[mark])) if suffix in CSV_SUFFIXES else None


def read_csv(path: Path, text: str, delimiter: str) -> Records:
    """Yield the rows of CSV or TSV with a header line; a quoted field may hold line breaks."""
    limit = csv.field_size_limit(MAX_CSV_FIELD)
    try:
        (first, header), *lines = _csv_lines(path, text, delimiter)
    finally:
        csv.field_size_limit(limit)
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


def _csv_lines(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Return the lines that are not blank, each with the number at which it begins.

    Most TSV files do not quote (those of GLUE begin fields with a bare quote): where reading with
    quotes fails or gives lines of unequal length, a tab-separated file is read without.
    """
    try:
        lines = _split_fields(path, text, delimiter, csv.QUOTE_MINIMAL)
        is_even = len({len(fields) for _, fields in lines}) == 1
    except DataError:
        if delimiter != "\t":
            raise
        is_even = False
    if is_even or delimiter != "\t":
        return lines
    return _split_fields(path, text, delimiter, csv.QUOTE_NONE)


def _split_fields(
    path: Path, text: str, delimiter: str, quoting: Any
) -> list[tuple[int, list[str]]]:
    source = io.StringIO(text, newline="")
    reader = csv.reader(source, delimiter=delimiter, quoting=quoting, strict=True)
    lines: list[tuple[int, list[str]]] = []
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return lines
        except csv.Error as error:  # where the next row begins is unknown: no row to leave out
            hint = "put the field in double quotes, and write a quote inside it twice"
            raise DataError(f"broken CSV: {error}", where=f"{path}:{start}", hint=hint) from None
        if fields:
            lines.append((start, fields))


def read_parquet(path: Path, data: bytes) -> Records:
    """Yield the rows of a Parquet file; raises `DataError` without pyarrow or if it is damaged."""
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


def read_xlsx(path: Path, data: bytes) -> Records:
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
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
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


def read_conll(path: Path, text: str) -> Records:
    """Yield the sentences of a CoNLL file: words of the first column, tags of the last.

    A line has one word, a blank line ends a sentence. Lines of -DOCSTART- and comments, which begin
    with # and have another number of columns than the first word, are no words.
    """
    words: list[tuple[str, str]] = []
    start, columns, broken = 1, 0, None
    for number, line in enumerate([*text.split("\n"), ""], 1):
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

"""Print the result of a command: its own rendering for people, or its JSON object for programs."""

import json
from collections.abc import Mapping
from typing import Any

from afina.io.result import Result


def print_result(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result on standard output; with `as_json` one JSON object as the last line."""
    if as_json:
        values = result.to_json() if isinstance(result, Result) else dict(result)
        print(json.dumps(values, ensure_ascii=False, default=str))
    elif isinstance(result, Result) and result.content():
        from rich.console import Console

        Console().print(result, crop=False)

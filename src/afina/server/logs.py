"""Logs on standard error, one JSON object per line; never a prompt, a completion or a key."""

import json
import logging
import sys
import time
from typing import Any

LOG = logging.getLogger("afina.server")
_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonLines(logging.Formatter):
    """A formatter of records as JSON: time, level, event, the fields of `extra`, the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        when = (
            time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03}Z"
        )
        line: dict[str, Any] = {
            "time": when,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= {
            name: value
            for name, value in vars(record).items()
            if name not in _PLAIN and value is not None
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logs() -> None:
    """Log afina's and uvicorn's records to standard error, in the same form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("afina.server", "afina.engine", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = (
            [handler] if name != "uvicorn.error" else [],
            name == "uvicorn.error",
        )
        logger.setLevel(logging.INFO)

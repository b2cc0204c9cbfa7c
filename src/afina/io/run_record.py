"""run.json of a training run."""

from pathlib import Path
from typing import Any

from afina.errors import AdapterError
from afina.io.adapter_metadata import check_version
from afina.io.migrations import migrate_run_record
from afina.io.strict_json import read_json_object

RUN_FILE, SETTINGS_FILE, METRICS_FILE = "run.json", "settings.yaml", "metrics.jsonl"
FAILURE_FILE = "failure.json"  # why a run ended before its last step
RUN_FORMAT_VERSION = 2  # the newest that is read


def read_run_record(folder: Path) -> dict[str, Any]:
    """Return run.json of a run under today's names, or {} where there is none.

    Raises:
        AdapterError: the file is damaged, or its format is newer than this version reads.
    """
    file = folder / RUN_FILE
    record = read_json_object(file) if file.is_file() else {}
    check_version(record.get("format_version", 0), RUN_FORMAT_VERSION, str(file))
    if not isinstance(record.get("settings", {}), dict):
        raise AdapterError("settings is not an object", where=f"{file}: settings")
    return migrate_run_record(record)

"""Names of version 0.1: files are translated by the table that the errors of old flags name."""

from typing import Any

from afina.io import migrations
from afina.settings.renamed import RENAMED_SETTINGS


def test_files_and_flags_follow_the_same_renaming() -> None:
    flags = dict(RENAMED_SETTINGS["TrainSettings"])
    flags.pop("holdout")  # became two settings: a file's value decides which one
    assert flags == migrations.SETTINGS


def test_settings_of_version_1_are_translated_once() -> None:
    old: dict[str, Any] = {"out": "runs/a", "steps": 4, "holdout": "rows.jsonl", "seed": 3}
    new = migrations.migrate_settings(old)
    assert new["output_dir"] == "runs/a" and new["max_steps"] == 4 and new["seed"] == 3
    assert new["eval_data"] == "rows.jsonl" and "holdout" not in new
    assert migrations.migrate_settings(new) == new
    assert migrations.migrate_settings({"holdout": 0.2})["eval_size"] == 0.2

"""benchmarks/RESULTS.md says what the result files say."""

import importlib.util
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_results_page_is_generated_from_the_result_files() -> None:
    spec = importlib.util.spec_from_file_location("common", BENCHMARKS / "common.py")
    assert spec is not None
    assert spec.loader is not None
    common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    assert (BENCHMARKS / "RESULTS.md").read_text() == common.results_page()
    assert "train_vs_trl" in common.results_page()

"""Stock clients of OpenAI's API, as they come from the registry, against a running server.

They are installed apart (`make clients`), and each test is skipped where they are not.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from live import Live, live

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
CLIENTS = (
    "openai_chat",
    "openai_responses",
    "openai_batches",
    "langchain",
    "instructor",
    "pydantic_ai",
    "openai_agents",
    "litellm",
    "lm_eval",
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="make clients"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(
        base="embedded", state_dir=tmp_path_factory.mktemp("state"), insecure=True
    ) as running:
        yield running


@pytest.mark.parametrize("client", CLIENTS)
def test_a_stock_client_runs_its_first_examples(server: Live, client: str) -> None:
    done = subprocess.run(
        [PYTHON, ROOT / "benchmarks" / "clients.py", server.url, "embedded", client],
        env={**os.environ, "OPENAI_API_KEY": "none", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]

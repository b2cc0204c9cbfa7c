"""What all tests share: a tiny Llama of random weights, its tokenizer and data, made here; nothing is downloaded."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before anybody imports triton: its kernels run on the CPU then
    )
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.planning import machine as forecast
from helpers import RATES, SHARED, save_model, tiny_tokenizer

torch.set_num_threads(1)
logging.set_verbosity_error()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `shared` where the material is missing; run the files of the longest first.

    Of two processes, each begins with half of the tests, and takes from the end of the other's when
    it has none left. A file's tests stay together, so that its fixtures are built once.
    """
    limits: dict[Path, tuple[float, bool]] = {}
    for item in items:
        if "shared" in item.keywords and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="needs ../shared"))
        cost = _limit(item), "slow" in item.keywords
        limits[item.path] = max(cost, limits.get(item.path, cost))
    items.sort(key=lambda item: limits[item.path], reverse=True)


def _limit(item: pytest.Item) -> float:
    """Seconds that a test asks for."""
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else 0.0


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def _same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made for one machine of 16 GB, which is not measured."""
    monkeypatch.setattr(forecast, "measured_rates", lambda device, anew=False: RATES)
    monkeypatch.setattr(forecast, "machine_memory", lambda: 16e9)


def _llama(tied: bool, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Folder of an untied tiny Llama, float32, 4 blocks."""
    return save_model(tmp_path_factory.mktemp("tiny"), _llama(False, len(tokenizer)), tokenizer)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The same with the output layer tied to the embedding."""
    return save_model(
        tmp_path_factory.mktemp("tied"), _llama(True, len(tokenizer)), tokenizer, seed=1
    )


@pytest.fixture
def base(tiny: Path) -> CausalLM:
    """The tiny base, freshly loaded."""
    return load_base(str(tiny))


WORDS = (
    "sol",
    "luna",
    "mar",
    "pan",
    "casa",
    "tree",
    "bird",
    "road",
    "stone",
    "night",
    "niño",
    "café",
)


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 chats of different lengths: say a word again, twice."""
    pairs = [(a, b) for a in WORDS for b in WORDS if a < b][:48]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {a} {b}"},
                {"role": "assistant", "content": f"{a} {b} {a}"},
            ]
        }
        for a, b in pairs
    ]
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain text of about 2,000 tokens."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(
        "\n".join(
            f"the {a} and the {b} went to the {a} at night." for a in WORDS for b in WORDS if a != b
        )
    )
    return path


@pytest.fixture(scope="session")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short general text, so that forgetting is measured quickly."""
    path = tmp_path_factory.mktemp("data") / "general.txt"
    path.write_text(
        "A bird sat on a stone by the road. La luna salió sobre el mar, y la casa dormía.\n"
    )
    return path

"""Optional dependencies: an import that names the extra of afina to install where it is missing."""

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

from afina.errors import SettingsError


@dataclass(frozen=True)
class Extra:
    """An extra of afina: the modules that it installs, and what it adds."""

    modules: tuple[str, ...]
    adds: str

    @property
    def missing(self) -> list[str]:
        """Modules that are not installed."""
        return [name for name in self.modules if find_spec(name) is None]


EXTRAS = {
    "serve": Extra(
        (
            "alembic",
            "fastapi",
            "httpx2",
            "llguidance",
            "prometheus_client",
            "sqlalchemy",
            "uvicorn",
        ),
        "the server",
    ),
    "postgres": Extra(("psycopg",), "the server's records in PostgreSQL"),
    "parquet": Extra(("pyarrow",), "rows in Parquet files"),
    "datasets": Extra(("datasets",), "data sets of the Hugging Face Hub by name"),
    "xlsx": Extra(("openpyxl",), "rows in XLSX files"),
    "gguf": Extra(("gguf",), "export to GGUF, for llama.cpp"),
    "onnx": Extra(("onnx", "onnxruntime", "onnxscript"), "export of classifiers to ONNX"),
    "graders": Extra(("nltk", "rapidfuzz", "rouge_score"), "ROUGE, similarities of reward graders"),
    "tensorboard": Extra(("tensorboard",), "--report-to tensorboard"),
    "wandb": Extra(("wandb",), "--report-to wandb"),
    "mlflow": Extra(("mlflow",), "--report-to mlflow"),
    "trackio": Extra(("trackio",), "--report-to trackio"),
    "completion": Extra(("shtab",), "shell completion"),
    "mcp": Extra(("mcp",), "the MCP server, afina mcp"),
    "audit": Extra(("model_signing", "OpenSSL"), "signatures of adapters"),
}


def import_extra(module: str, extra: str) -> ModuleType:
    """Return a module that the extra `extra` installs, or one of afina that needs it.

    Raises:
        SettingsError: A package of the extra is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or "afina").partition(".")[0]
        if missing == "afina":  # a module of afina itself: no matter of extras
            raise
        hint = f"pip install 'afina[{extra}]'"
        raise SettingsError(f"{missing} is not installed", hint=hint) from error

"""A merged classifier or encoder as an ONNX file, with what turns inputs into tensors alongside.

    model.onnx    input_ids, attention_mask (rows, length)      -> logits (rows, classes)
                  pixel_values (rows, channels, height, width)  -> logits (rows, classes)
                  input_ids, attention_mask (rows, length)      -> sentence_embedding (rows, width)

Rows and length may have any size. The file's answers are compared with those of the merged model,
which is itself compared with the adapted one.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from afina.errors import MergeError
from afina.io.atomic import atomic_directory
from afina.io.extras import import_extra
from afina.merging.merge_into_base import make_probe, write_merged
from afina.merging.results import ExportResult
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier
from afina.models.encoder import Encoder
from afina.models.frozen import FrozenModel
from afina.models.loading import silence_transformers
from afina.settings import ExportSettings, MergedModelSettings, MergeSettings

MODEL_FILE = "model.onnx"
VECTOR = "sentence_embedding"  # "embedding" is a name that the exporter gives
MAX_DIFFERENCE = 1e-3  # of logits, or of elements of a vector of length 1
WEIGHTS = (".safetensors", ".bin", ".index.json")
COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


class _Outputs(nn.Module):
    """A model with named tensors in and one tensor out."""

    def __init__(self, model: nn.Module, base: Classifier, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.embedding = base.embedding if isinstance(base, Encoder) else None

    def forward(self, *columns: Tensor) -> Tensor:
        """Return logits, or the vector of each text."""
        inputs = dict(zip(self.names, columns, strict=True))
        found = self.model(**inputs)
        if self.embedding is None:
            return found.logits.float()  # type: ignore[no-any-return]
        return self.embedding.pool(found.last_hidden_state, inputs["attention_mask"])


def export_onnx(settings: ExportSettings, out: Path) -> ExportResult:
    """Write base and adapter to the folder `out`; return the proof of the merged model.

    Raises:
        MergeError: It is a language model, or the file computes something else.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        import_extra(module, "onnx")
    with TemporaryDirectory() as temporary:
        fields = {name: getattr(settings, name) for name in MergedModelSettings.model_fields}
        merged_dir = Path(temporary) / "merged"
        fields |= {"adapter": settings.adapter, "output_dir": merged_dir, "dtype": "float32"}
        result, merged = write_merged(
            MergeSettings(**fields | {"require_audit": False}), str(settings.adapter), _check
        )
        assert isinstance(merged, Classifier)
        with atomic_directory(out) as folder:
            difference = _write(merged, merged_dir, folder / MODEL_FILE)
            for file in merged_dir.rglob("*"):
                if file.is_file() and not file.name.endswith(WEIGHTS):
                    there = folder / file.relative_to(merged_dir)
                    there.parent.mkdir(exist_ok=True)
                    shutil.copy2(file, there)
    return replace(result, out=str(out), max_onnx_difference=difference)


def _check(base: FrozenModel) -> None:
    """Raise `MergeError` for a language model."""
    if isinstance(base, CausalLM):
        raise MergeError(
            "a language model is not written as ONNX",
            where=base.name,
            why="the file would compute all earlier tokens again for each new one",
            hint="--format gguf",
        )


def _write(merged: Classifier, merged_dir: Path, file: Path) -> float:
    """Write the file; return the largest difference of its outputs from the merged model's."""
    probe: Mapping[str, Tensor] = make_probe(merged)
    names = [name for name in COLUMNS if name in probe]
    # loaded again: the modules of `merged` read packed rows
    kind: Any = type(merged.model)
    with silence_transformers(), _silence_exporter():
        model = kind.from_pretrained(merged_dir, attn_implementation="eager", dtype=torch.float32)
        wrapped = _Outputs(model, merged, names).eval()
        wrapped.requires_grad_(False)
        torch.onnx.export(
            wrapped,
            tuple(probe[name] for name in names),
            file,
            input_names=names,
            output_names=[VECTOR if isinstance(merged, Encoder) else "logits"],
            dynamic_shapes=(tuple(_free_sizes(name) for name in names),),
            external_data=False,
            verbose=False,
        )
    difference = max(
        _difference(merged, file, {name: probe[name][:rows] for name in names})
        for rows in (1, len(probe[names[0]]))
    )
    if not difference <= MAX_DIFFERENCE:
        raise MergeError(
            "the ONNX file differs from the merged model",
            why=f"by up to {difference:.3g}, and {MAX_DIFFERENCE:g} is allowed",
            hint="--format hf",
        )
    return difference


@contextmanager
def _silence_exporter() -> Iterator[None]:
    """Leave out warnings of packages that are not needed, and of PyTorch's own use of itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _free_sizes(name: str) -> dict[int, Any]:
    """Return the sizes of an input that may differ from the example's."""
    rows = {0: torch.export.Dim.DYNAMIC}
    return rows if name == "pixel_values" else rows | {1: torch.export.Dim.DYNAMIC}


@torch.no_grad()
def _difference(merged: Classifier, file: Path, inputs: Mapping[str, Tensor]) -> float:
    runtime: Any = import_extra("onnxruntime", "onnx")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    given = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    if isinstance(merged, Encoder):
        expected = merged.embed(dict(inputs))
    else:
        expected = merged.logits(dict(inputs))
    return float((torch.from_numpy(given) - expected).abs().max())

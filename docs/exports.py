"""Write docs/exports.md and docs/es/exports.md: each kind of adapter in each format, cell by cell.

    python docs/exports.py

Each cell is an export of a tiny model that was run: it was written, or refused with the reason that
is printed. The packages of the extras `gguf` and `onnx` have to be installed.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers as T

import afina
from afina.adapters.saving import save_adapter
from afina.errors import AfinaError
from afina.io.translation import translate, use_language
from afina.merging.export import FORMATS
from afina.models.loading import load_base

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from helpers import put, save_model, tiny_tokenizer  # noqa: E402

PAGES = {"en": DOCS / "exports.md", "es": DOCS / "es" / "exports.md"}
SHAPE = {
    "vocab_size": 324,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# (name, Spanish name, what `put` gets); further rows are made of these or trained
ADAPTERS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("afina: lora", "afina: lora", {}),
    "dora": ("afina: dora", "afina: dora", {"method": "dora"}),
    "mora": ("afina: mora", "afina: mora", {"method": "mora", "rank": 4}),
    "full": ("afina: full", "afina: full", {"method": "full"}),
    "alora": ("afina: activated lora", "afina: lora activada", {"invocation": (5, 6)}),
    "tokens": (
        "afina: lora with new tokens",
        "afina: lora con tokens nuevos",
        {"trainable_tokens": {"<|new|>": 320}},
    ),
    "classifier": ("afina: classifier", "afina: clasificador", {}),
    "encoder": ("afina: encoder of texts", "afina: codificador de textos", {}),
    "peft-lora": ("PEFT: LoRA", "PEFT: LoRA", {}),
    "peft-dora": ("PEFT: DoRA", "PEFT: DoRA", {"method": "dora"}),
    "mlx-lora": ("MLX: LoRA", "MLX: LoRA", {}),
    "mlx-dora": ("MLX: DoRA", "MLX: DoRA", {"method": "dora"}),
    "gguf-lora": ("GGUF: LoRA", "GGUF: LoRA", {}),
}
TEXTS = {
    "en": (
        "# Ways out\n",
        "What `afina export ADAPTER --format FORMAT` makes of each kind of adapter. This page is "
        "written by `python docs/exports.py`, which runs each export on a tiny model; a number is "
        "the reason for which a cell is refused.\n",
        "adapter",
        "written",
        "Adapters of mlx-lm (a folder) and llama.cpp (a file, with `--base`) are read by `export` "
        "too; `--format peft` makes adapters of them that all commands read.\n",
    ),
    "es": (
        "# Formatos de exportación\n",
        "Qué hace `afina export ADAPTER --format FORMAT` con cada clase de adaptador. Esta página "
        "la escribe `python docs/exports.py`, que ejecuta cada exportación con un modelo diminuto; "
        "un número es el motivo por el que se rechaza una celda.\n",
        "adaptador",
        "se escribe",
        "`export` también lee adaptadores de mlx-lm (una carpeta) y de llama.cpp (un archivo, con "
        "`--base`); `--format peft` hace de ellos adaptadores que leen todas las órdenes.\n",
    ),
}


def make_adapter(name: str, folder: Path) -> tuple[Path, str | None]:
    """Return an adapter of a kind, and the base where it does not record one."""
    base_dir = folder / "base"
    if name in ("classifier", "encoder"):
        return _train_encoder(name, folder), None
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    save_model(base_dir, T.LlamaConfig(**SHAPE), tokenizer)
    base = load_base(str(base_dir))
    save_adapter(put(base, **{"rank": 2} | ADAPTERS[name][2]), base, folder / "a")
    kind, _, _ = name.partition("-")
    if kind == "peft":
        (folder / "a" / "afina.json").unlink()
        return folder / "a", None
    if kind not in ("mlx", "gguf"):
        return folder / "a", None
    form = "gguf-lora" if kind == "gguf" else kind
    out = afina.export(folder / "a", format=form, output=folder / kind)["out"]
    return Path(out), str(base_dir) if kind == "gguf" else None


def _train_encoder(name: str, folder: Path) -> Path:
    """Return a run of one step on a random BERT."""
    tokenizer = tiny_tokenizer(None)
    shape = {key: SHAPE[key] for key in SHAPE if key not in ("num_key_value_heads",)}
    T.BertModel(T.BertConfig(**shape)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    words = ("the sea", "the night", "a bird", "the moon")
    if name == "classifier":
        rows = [{"text": word, "label": "ab"[n % 2]} for n, word in enumerate(words * 3)]
    else:
        rows = [{"anchor": word, "positive": f"{word} {n}"} for n, word in enumerate(words * 3)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    objective = "classify" if name == "classifier" else "embed"
    afina.train(
        folder / "rows.jsonl",
        base=str(folder / "base"),
        objective=objective,
        max_steps=1,
        output_dir=folder / "run",
    )
    return folder / "run"


def try_exports(
    names: Iterable[str], formats: Iterable[str], describe: Callable[[AfinaError], str]
) -> dict[tuple[str, str], str | None]:
    """Return the reason of each cell (adapter, format); None where it was written."""
    found: dict[tuple[str, str], str | None] = {}
    for name in names:
        with TemporaryDirectory() as temporary:
            adapter, base = make_adapter(name, Path(temporary))
            for form in formats:
                values = {} if base is None else {"base": base}
                try:
                    out = Path(temporary) / f"out-{form}"
                    afina.export(adapter, format=form, output=out, **values)
                    found[name, form] = None
                except AfinaError as error:
                    found[name, form] = describe(error)
    return found


def reason(error: AfinaError) -> str:
    """Return what an error says, in English; `page` translates it."""
    return "\n".join(filter(None, (error.what, error.why)))


def page(found: Mapping[tuple[str, str], str | None], language: str) -> str:
    """Return the page in a language."""
    title, intro, head, written, end = TEXTS[language]
    names = list(dict.fromkeys(name for name, _ in found))
    formats = list(dict.fromkeys(form for _, form in found))
    reasons = list(dict.fromkeys(filter(None, found.values())))
    lines = [f"| {head} | {' | '.join(formats)} |", f"|{'---|' * (len(formats) + 1)}"]
    for name in names:
        cells = [
            written if why is None else str(reasons.index(why) + 1)
            for why in (found[name, form] for form in formats)
        ]
        lines.append(f"| {ADAPTERS[name][language == 'es']} | {' | '.join(cells)} |")
    with use_language(language):
        notes = [
            f"{number}. {': '.join(map(translate, why.splitlines()))}."
            for number, why in enumerate(reasons, 1)
        ]
    return "\n".join((title, intro, *lines, "", *notes, "", end))


def read_page(file: Path) -> dict[tuple[str, str], str | None]:
    """Return the reason of each cell of a written page; None where it says that it is written."""
    lines = file.read_text(encoding="utf-8").splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    numbered = [line.partition(". ") for line in lines if line[:1].isdigit()]
    reasons = {number: text.removesuffix(".") for number, _, text in numbered}
    names = {text: key for key, titles in ADAPTERS.items() for text in titles[:2]}
    return {
        (names[row[0]], form): reasons.get(cell)
        for row in table[1:]
        for form, cell in zip(table[0][1:], row[1:], strict=True)
    }


def main() -> None:
    """Run all exports and write both pages."""
    found = try_exports(ADAPTERS, FORMATS, reason)
    for language, file in PAGES.items():
        file.write_text(page(found, language), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Ways out: what each format writes, read by the program's own package where it is installed."""

import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import afina
from afina.adapters.saving import save_adapter
from afina.errors import AfinaError, SettingsError
from afina.merging.export import FORMATS
from afina.merging.merge_into_base import merge_into_base
from afina.models.loading import load_base
from helpers import TEMPLATE, logits, put, save_model, tiny_tokenizer
from test_gguf_families import SHAPE

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import exports as exports_page

MINILM = Path.home() / ".cache" / "afina-real" / "minilm"

# ---- Modelfile

INSTRUCTIONS = ("from", "parameter", "template", "system", "adapter", "license", "message")


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """(instruction, value) by the rules that Ollama publishes: names in any case, values to the end of the line, or
    between double or triple quotes, lines that begin with # are comments."""
    found: list[tuple[str, str]] = []
    while text := text.lstrip():
        if text.startswith("#"):
            text = text.partition("\n")[2]
            continue
        name, _, text = text.partition(" ")
        assert name.lower() in INSTRUCTIONS, name
        key = ""
        if name.lower() == "parameter":
            key, _, text = text.partition(" ")
        for quotes in ('"""', '"'):
            if text.startswith(quotes):
                value, end, text = text[len(quotes) :].partition(quotes)
                assert end, "quotes that do not end"
                assert not text.partition("\n")[0].strip()
                break
        else:
            value, _, text = text.partition("\n")
        found.append((f"{name.lower()} {key}".strip(), value))
    assert sum(name == "from" for name, _ in found) == 1
    return found


def execute(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template writes, of the few forms that are used: if, else if, else, range, end, fields."""
    import re

    tokens = re.split(r"\{\{ (.*?) \}\}", template)  # text, action, text, ...
    system = "".join(m["content"] for m in messages if m["role"] == "system")

    def truth(condition: str, scope: dict[str, Any]) -> bool:
        match condition.split(maxsplit=2):
            case [".System"] | ["$.System"]:
                return bool(system)
            case ["eq", "$m.Role", role]:
                return bool(scope["m"]["role"] == json.loads(role))
            case ["and", "$.System", "(le $i 1)"]:
                return bool(system) and scope["i"] <= 1
        raise AssertionError(condition)

    def block(at: int) -> tuple[list[Any], int]:
        """Nodes up to an else or end, and where that is."""
        nodes: list[Any] = []
        while at < len(tokens):
            if at % 2 == 0:
                nodes.append(tokens[at])
            elif tokens[at].startswith(("if ", "range ")):
                arms, kind = [], tokens[at]
                while True:
                    inner, at = block(at + 1)
                    arms.append((kind, inner))
                    kind = tokens[at]
                    if kind == "end":
                        break
                nodes.append(arms)
            elif tokens[at] == "end" or tokens[at].startswith("else"):
                return nodes, at
            else:
                nodes.append((tokens[at],))
            at += 1
        return nodes, at

    def written(nodes: list[Any], scope: dict[str, Any]) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, str):
                yield node
            elif isinstance(node, tuple):
                yield system if node[0] == "$.System" else scope["m"]["content"]
            elif node[0][0].startswith("range"):
                assert node[0][0] == "range $i, $m := .Messages"
                for i, m in enumerate(messages):
                    yield from written(node[0][1], {"i": i, "m": m})
            else:
                for kind, inner in node:
                    condition = kind.removeprefix("else ").removeprefix("if ")
                    if kind == "else" or truth(condition, scope):
                        yield from written(inner, scope)
                        break

    return "".join(written(block(0)[0], {}))


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ (first if loop.first else '') + m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}{{ raise_exception('roles') }}{% endif %}{% endfor %}"
)
CHATS = [
    ["user"],
    ["user", "assistant", "user"],
    ["system", "user"],
    ["system", "user", "assistant", "user"],
]


@pytest.mark.parametrize(
    "template",
    [CHATML, GEMMA, LLAMA3, MISTRAL, TEMPLATE],
    ids=["chatml", "gemma", "llama3", "mistral", "own"],
)
def test_a_go_template_writes_what_the_template_writes(template: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(template)
    save_model(tmp_path / "b", T.LlamaConfig(**SHAPE), tokenizer)
    result = afina.export(base=str(tmp_path / "b"), format="ollama", output=tmp_path / "kind bot")
    assert result["next_command"] == f"ollama create kind-bot -f '{tmp_path}/kind bot/Modelfile'"
    found = read_modelfile((tmp_path / "kind bot" / "Modelfile").read_text())
    values = dict(found)
    assert (tmp_path / "kind bot" / values["from"]).is_file()
    system = values.get("system")
    assert system == ("Be kind." if template == CHATML else None)
    assert "</s>" in [value for name, value in found if name == "parameter stop"]
    for roles in CHATS:
        if roles[0] == "system" and template == MISTRAL:
            continue
        chat = [{"role": role, "content": f"{role} {n}!"} for n, role in enumerate(roles)]
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert execute(values["template"], chat) == expected, roles


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "the model has no chat template"),
        (
            "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
            "it changes the messages",
        ),
        ("{{ messages | length }}{{ messages[-1]['content'] }}", "it rewrites earlier messages"),
        ("{{ '{{' }}" + TEMPLATE, "it has marks of Go templates"),
    ],
)
def test_a_template_of_another_form_is_left_out_with_its_reason(
    template: str | None, why: str, tmp_path: Path
) -> None:
    save_model(tmp_path / "b", T.LlamaConfig(**SHAPE), tiny_tokenizer(template))
    afina.export(base=str(tmp_path / "b"), format="ollama", output=tmp_path / "o")
    text = (tmp_path / "o" / "Modelfile").read_text()
    assert "template" not in dict(read_modelfile(text)) and f"# no TEMPLATE: {why}" in text


def test_a_modelfile_has_the_format_of_the_run(tmp_path: Path) -> None:
    """Stop tokens and template are those that the adapter was trained with, and weights have 8 bits."""
    from afina.data.renderer import Renderer
    from afina.io.chat_format import ChatFormat

    tokenizer = tiny_tokenizer(TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    save_model(tmp_path / "b", T.LlamaConfig(**SHAPE), tokenizer)
    base = load_base(str(tmp_path / "b"))
    chat_format = Renderer(base.tokenizer, ChatFormat("chatml"), 128).chat_format
    save_adapter(put(base, rank=2), base, tmp_path / "a", {"chat": chat_format.record()})
    result = afina.export(
        tmp_path / "a", format="ollama", outtype="q8_0", output=tmp_path / "o", max_kl=5
    )
    assert result["weights"] == "q8_0"
    found = read_modelfile((tmp_path / "o" / "Modelfile").read_text())
    assert {"</s>", "<|im_end|>"} == {value for name, value in found if name == "parameter stop"}
    assert "<|im_start|>" in dict(found)["template"]


# ---- MLX


MLX_FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaConfig(**SHAPE),
    "qwen3": lambda: T.Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),
    "gemma2": lambda: T.Gemma2Config(**SHAPE, head_dim=32, query_pre_attn_scalar=32),
    "phi3": lambda: T.Phi3Config(**SHAPE),
}


def adapter_on(folder: Path, config: Any, **spec: Any) -> Any:
    """A base and a random adapter on it, as files; returns the loaded base."""
    name = save_model(folder / "b", config, tiny_tokenizer())
    base = load_base(str(name))
    save_adapter(put(base, **{"rank": 3, "alpha": 6.0} | spec), base, folder / "a")
    return base


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", MLX_FAMILIES)
def test_factors_for_mlx(family: str, method: str, tmp_path: Path) -> None:
    """scale * A B of the file is our update, also with ranks and strengths of modules of their own."""
    from safetensors.torch import load_file

    first, second = "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"
    own = dict(rank_pattern={first: 5}, alpha_pattern={second: 1.5})
    base = adapter_on(tmp_path, MLX_FAMILIES[family](), method=method, **own)
    adapter = afina.load_adapter(tmp_path / "a", base)
    result = afina.export(tmp_path / "a", format="mlx", output=tmp_path / "m")
    assert result["next_command"].startswith("mlx_lm.generate --model ")
    about = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    shared = about["lora_parameters"]
    assert (about["fine_tune_type"], about["num_layers"], shared["rank"]) == (method, 2, 5)
    tensors = load_file(tmp_path / "m" / "adapters.safetensors")
    assert (
        {name.rpartition(".")[0] for name in tensors} == set(adapter.layers) == set(shared["keys"])
    )
    for path, layer in adapter.layers.items():
        weight = base.model.get_submodule(path).weight.double()
        a, b = (tensors[f"{path}.lora_{half}"].double() for half in "ab")
        assert a.shape[1] == b.shape[0] == 5
        merged = weight + shared["scale"] * (a @ b).T
        if method == "dora":
            merged *= (tensors[f"{path}.m"] / merged.norm(dim=1))[:, None]
        assert torch.allclose(merged, layer.merged_weight(weight).detach(), atol=1e-6), path


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", MLX_FAMILIES)
def test_mlx_lm_computes_the_adapted_model(family: str, method: str, tmp_path: Path) -> None:
    mlx = pytest.importorskip("mlx.core", reason="mlx-lm is not installed")
    from mlx_lm.utils import load

    own = dict(rank_pattern={"model.layers.0.self_attn.o_proj": 5})
    adapter_on(tmp_path, MLX_FAMILIES[family](), method=method, **own)
    base = load_base(str(tmp_path / "b"))
    adapter = afina.load_adapter(tmp_path / "a", base)
    afina.export(tmp_path / "a", format="mlx", output=tmp_path / "m")
    model, _ = load(str(tmp_path / "b"), adapter_path=str(tmp_path / "m"))
    run = torch.arange(20, 40), torch.arange(20), (0, 20)
    merge_into_base(base, adapter)
    expected = logits(base, run)
    given = torch.tensor(model(mlx.array([run[0].tolist()]))[0].astype(mlx.float32).tolist())
    assert (given - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (dict(method="mora"), "lora and dora only, and this is a mora"),
        (dict(method="full"), "lora and dora only, and this is a full"),
        (dict(target_modules=["embed_tokens"]), "model.embed_tokens is adapted"),
        (dict(invocation=(5, 6)), "active after its invocation"),
    ],
)
def test_adapters_that_mlx_lm_would_apply_otherwise(spec: Any, why: str, tmp_path: Path) -> None:
    adapter_on(tmp_path, T.LlamaConfig(**SHAPE), **spec)
    with pytest.raises(AfinaError, match=why):
        afina.export(tmp_path / "a", format="mlx", output=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_family_with_other_names_in_mlx_lm(tmp_path: Path) -> None:
    config = T.GPT2Config(vocab_size=324, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    adapter_on(tmp_path, config)
    with pytest.raises(AfinaError, match="of the family 'gpt2'"):
        afina.export(tmp_path / "a", format="mlx", output=tmp_path / "m")


# ---- settings


@pytest.mark.parametrize("form", FORMATS)
def test_settings_without_effect_are_errors(form: str, tmp_path: Path) -> None:
    adapter_on(tmp_path, T.LlamaConfig(**SHAPE))
    values = dict(
        dtype="float32", quantization="nf4", max_kl=1.0, allow_other_base=True, outtype="q8_0"
    )
    for name in FORMATS[form].unused:
        with pytest.raises(SettingsError, match=f"{name} has no effect on --format {form}"):
            afina.export(tmp_path / "a", format=form, output=tmp_path / "o", **{name: values[name]})
    assert not (tmp_path / "o").exists()


# ---- adapters of other programs


@pytest.mark.parametrize("form", ["mlx", "gguf-lora"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_adapters_of_other_programs_come_back(family: str, form: str, tmp_path: Path) -> None:
    """What was written for mlx-lm or llama.cpp is read again as an equal PEFT adapter."""
    own = dict(rank_pattern={"model.layers.0.self_attn.o_proj": 5}, scaling="rslora")
    base = adapter_on(tmp_path, MLX_FAMILIES[family](), **own)
    there = afina.export(tmp_path / "a", format=form, output=tmp_path / "there")["out"]
    where = {"base": str(tmp_path / "b")} if form == "gguf-lora" else {}
    afina.export(there, format="peft", output=tmp_path / "back", **where)
    adapters = [afina.load_adapter(tmp_path / name, base, f"{name}2") for name in ("a", "back")]
    for path, layer in adapters[0].layers.items():
        weight = torch.zeros(layer.b.shape[0], layer.a.shape[1])
        ours, theirs = (one.layers[path].merged_weight(weight).detach() for one in adapters)
        assert torch.allclose(ours, theirs, atol=1e-6), path
    merged = afina.export(there, format="gguf", output=tmp_path / "m.gguf", **where)
    assert merged["kl"] < 1e-5


def test_adapters_of_other_programs_that_cannot_be_read(tmp_path: Path) -> None:
    adapter_on(tmp_path, T.LlamaConfig(**SHAPE))
    lora = afina.export(tmp_path / "a", format="gguf-lora", output=tmp_path / "l.gguf")["out"]
    whole = afina.export(tmp_path / "a", format="gguf", output=tmp_path / "m.gguf")["out"]
    for source, message in ((lora, "does not record its base"), (whole, "has no LoRA")):
        with pytest.raises(AfinaError, match=message):
            afina.export(source, format="peft", output=tmp_path / "o")
    (tmp_path / "cut.gguf").write_bytes(Path(lora).read_bytes()[:100])
    with pytest.raises(AfinaError, match="cannot be read"):
        afina.export(tmp_path / "cut.gguf", format="peft", output=tmp_path / "o")
    mlx = Path(afina.export(tmp_path / "a", format="mlx", output=tmp_path / "mlx")["out"])
    (mlx / "adapter_config.json").write_text('{"fine_tune_type": "full", "num_layers": 2}')
    with pytest.raises(AfinaError, match="of the kind 'full'"):
        afina.export(mlx, format="peft", output=tmp_path / "o")


# ---- ONNX


@pytest.fixture(scope="module")
def encoder_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of one step of a text classifier or an encoder, each made once."""
    known: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in known:
            known[name] = exports_page.make_adapter(name, tmp_path_factory.mktemp(name))[0]
        return known[name]

    return make


def onnx_answers(folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    named = {name: value.numpy() for name, value in inputs.items()}
    return torch.from_numpy(session.run(None, named)[0])


def check_onnx(run: Path, folder: Path, texts: list[str]) -> None:
    """ONNX Runtime's answers are those of the adapted model, for one row and for several lengths."""
    from afina.adapters.load_run import load_run
    from afina.models.encoder import Encoder
    from afina.settings import MergedModelSettings

    opened = load_run(run, MergedModelSettings(dtype="float32"))
    base: Any = opened.base
    for chosen in (texts[:1], texts):
        inputs = base.batch([base.encode(text) for text in chosen])
        with base.forward_context.use(opened.active.always_on().row_segments()), torch.no_grad():
            expected = base.embed(inputs) if isinstance(base, Encoder) else base.logits(inputs)
        assert (onnx_answers(folder, inputs) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["classifier", "encoder"])
def test_onnx_runtime_answers_as_we_do(name: str, encoder_runs: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'afina[onnx]'")
    run = encoder_runs(name)
    result = afina.export(run, format="onnx", output=tmp_path / "o")
    assert result["max_onnx_difference"] < 1e-3
    check_onnx(run, tmp_path / "o", ["the night", "a bird sat on a stone under a tree", "sea"])
    found = {file.name for file in (tmp_path / "o").iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json"} <= found
    assert "model.safetensors" not in found
    if name == "classifier":
        labels = json.loads((tmp_path / "o" / "config.json").read_text())["id2label"]
        assert labels == {"0": "a", "1": "b"}
    else:
        assert "modules.json" in found


def test_onnx_of_pictures(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'afina[onnx]'")
    from PIL import Image

    config = T.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    T.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "b")
    for label, color in (("dark", 20), ("light", 230)):
        (tmp_path / "d" / label).mkdir(parents=True)
        for number in range(6):
            Image.new("L", (8, 8), color + number).save(tmp_path / "d" / label / f"{number}.png")
    afina.train(tmp_path / "d", base=str(tmp_path / "b"), max_steps=1, output_dir=tmp_path / "r")
    result = afina.export(tmp_path / "r", format="onnx", output=tmp_path / "o")
    assert result["max_onnx_difference"] < 1e-3
    for rows in (1, 3):
        assert onnx_answers(tmp_path / "o", {"pixel_values": torch.zeros(rows, 1, 8, 8)}).shape == (
            rows,
            2,
        )


@pytest.mark.skipif(not MINILM.exists(), reason="MiniLM is not on this machine")
def test_onnx_of_minilm(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'afina[onnx]'")
    rows = [{"anchor": f"a question {n}", "positive": f"its answer {n}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    afina.train(
        tmp_path / "rows.jsonl",
        base=str(MINILM),
        objective="embed",
        max_steps=2,
        learning_rate=1e-2,
        output_dir=tmp_path / "r",
    )
    afina.export(tmp_path / "r", format="onnx", output=tmp_path / "o")
    texts = ["Where is the library?", "rain", "A long sentence about nothing " * 8]
    check_onnx(tmp_path / "r", tmp_path / "o", texts)


def test_a_language_model_is_not_written_as_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afina.merging.onnx_model.import_extra", lambda module, extra: None)
    adapter_on(tmp_path, T.LlamaConfig(**SHAPE))
    with pytest.raises(AfinaError, match="a language model is not written as ONNX"):
        afina.export(tmp_path / "a", format="onnx", output=tmp_path / "o")
    assert not (tmp_path / "o").exists()


# ---- the page

LANGUAGES = ("en", "es")
FAST = [name for name in exports_page.ADAPTERS if name not in ("classifier", "encoder")]


def test_the_page_is_what_exports_do() -> None:
    """Each cell of docs/exports.md of a language model's adapter; ONNX where it is installed."""
    stored = exports_page.read_page(exports_page.PAGES["en"])
    formats = [name for name in FORMATS if name != "onnx" or find_spec("onnxruntime")]
    found = exports_page.try_exports(FAST, formats, exports_page.reason)
    for cell, why in found.items():
        assert stored[cell] == (why and ": ".join(why.splitlines())), cell
    assert set(stored) == {(name, form) for name in exports_page.ADAPTERS for form in FORMATS}


def test_the_pages_have_the_same_cells() -> None:
    pages = [exports_page.read_page(exports_page.PAGES[language]) for language in LANGUAGES]
    assert {cell: why is None for cell, why in pages[0].items()} == {
        cell: why is None for cell, why in pages[1].items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classifier", "encoder"])
def test_the_page_is_what_exports_of_encoders_do(name: str) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'afina[onnx]'")
    stored = exports_page.read_page(exports_page.PAGES["en"])
    for cell, why in exports_page.try_exports([name], FORMATS, exports_page.reason).items():
        assert stored[cell] == (why and ": ".join(why.splitlines())), cell

"""GGUF of each family and tokenizer that afina serves: read back here, and run by llama.cpp where it is installed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as T
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import afina
from afina.adapters.saving import save_adapter
from afina.errors import BaseError
from afina.merging.gguf_tokenizer import GPT4O, TEKKEN, WORDS
from afina.merging.merge_into_base import merge_into_base
from afina.models.loading import load_base
from helpers import CORPUS, logits, put, save_model, tiny_tokenizer

SHAPE = dict(
    vocab_size=324,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=192,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
SCALES = dict(
    embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=2.0
)
LONG = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    long_factor=[2.0] * 8,
    original_max_position_embeddings=256,  # llama.cpp selects by the size of its context, here 256
)
GEMMA2 = dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=8)
GEMMA3 = dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=8)
WITHOUT_GROUPS = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaConfig(**SHAPE),
    "qwen2": lambda: T.Qwen2Config(**SHAPE),
    "qwen3": lambda: T.Qwen3Config(**SHAPE, head_dim=32),
    "gemma": lambda: T.GemmaConfig(**SHAPE, head_dim=32),
    "gemma2": lambda: T.Gemma2Config(**SHAPE, **GEMMA2),
    "gemma3": lambda: T.Gemma3TextConfig(**{**SHAPE, "num_hidden_layers": 7}, **GEMMA3),
    "phi": lambda: T.PhiConfig(**WITHOUT_GROUPS),
    "phi3": lambda: T.Phi3Config(**SHAPE),
    "phi3_long": lambda: T.Phi3Config(
        **{**SHAPE, "max_position_embeddings": 512},
        rope_parameters=LONG,
        original_max_position_embeddings=256,
    ),
    "granite": lambda: T.GraniteConfig(**SHAPE, **SCALES, tie_word_embeddings=True),
    "olmo2": lambda: T.Olmo2Config(**SHAPE),
    "cohere": lambda: T.CohereConfig(**SHAPE, logit_scale=0.5, tie_word_embeddings=True),
}
TEXTS = (
    "The house by the road was old; in 1984 it wasn't ours yet.",
    "  two spaces,\n\na new line\tand a tab \n",
    "¿Dónde está el niño? —preguntó la señora, a las 10:45.",
    "HTTPServer's McDonald 日本 🙂 x²",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, float]]:
    """(folder of the base with its LoRA, merged GGUF, KL) of a family; each is made once."""
    known: dict[str, tuple[Path, Path, float]] = {}

    def make(family: str) -> tuple[Path, Path, float]:
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            save_model(folder / "base", FAMILIES[family](), tiny_tokenizer())
            base = load_base(str(folder / "base"))
            save_adapter(put(base, rank=2, alpha=4.0), base, folder / "lora")
            result = afina.export(folder / "lora", format="gguf", output=folder / "m.gguf")
            known[family] = folder, folder / "m.gguf", result["kl"]
        return known[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_written_with_its_adapter(family: str, exported: Any) -> None:
    _, file, kl = exported(family)
    assert kl < 1e-5
    reader = gguf.GGUFReader(file)
    kinds = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    arch = kinds[reader.fields["general.architecture"].contents()]
    allowed = {gguf.TENSOR_NAMES[kind].format(bid=0) for kind in gguf.MODEL_TENSORS[arch]}
    found = {tensor.name.rpartition(".")[0] for tensor in reader.tensors}
    assert {name for name in found if name.startswith("blk.0.")} <= allowed
    assert {name for name in found if not name.startswith("blk.")} <= allowed | {"rope_freqs"}


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_each_family(family: str, exported: Any, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder, file, _ = exported(family)
    base = load_base(str(folder / "base"))
    tokens = torch.randint(5, 300, (24,), generator=torch.Generator().manual_seed(1))
    run = tokens, torch.arange(24), (0, 24)
    alone = logits(base, run)
    adapter = afina.load_adapter(folder / "lora", base)
    merge_into_base(base, adapter)
    adapted = logits(base, run)
    given = llama_logits(file, tokens.tolist())
    assert np.abs(given - adapted.numpy()).max() < 0.02 < np.abs((alone - adapted).numpy()).max()
    plain, lora = tmp_path / "base.gguf", tmp_path / "lora.gguf"
    afina.export(base=str(folder / "base"), format="gguf", output=plain)
    afina.export(folder / "lora", format="gguf-lora", output=lora)
    beside = llama_logits(plain, tokens.tolist(), lora)
    assert np.abs(beside - adapted.numpy()).max() < 0.02


def llama_logits(file: Path, tokens: list[int], lora: Path | None = None) -> np.ndarray:
    """llama.cpp's logits after each token, with keys and values in float32."""
    from llama_cpp import Llama

    model = Llama(
        str(file),
        n_ctx=96,
        n_batch=96,
        n_threads=1,
        logits_all=True,
        verbose=False,
        type_k=0,
        type_v=0,
        lora_path=lora and str(lora),
    )
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])


# ---- blocks of 4 to 8 bits


@pytest.mark.parametrize(
    ("kind", "most"), [("q8_0", 0.01), ("q5_1", 0.1), ("q5_0", 0.1), ("q4_1", 0.2), ("q4_0", 0.2)]
)
def test_blocks_are_those_of_the_file_format(
    kind: str, most: float, exported: Any, tmp_path: Path
) -> None:
    """Each weight is within half a step of its block; embeddings have 8 bits, norms 32."""
    folder, plain, _ = exported("qwen2")
    file = tmp_path / "q.gguf"
    result = afina.export(folder / "lora", format="gguf", outtype=kind, output=file, max_kl=5)
    assert result["weights"] == kind and 0 < result["kl"] < 5
    exact = {t.name: t.data for t in gguf.GGUFReader(plain).tensors}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        vector, precise = values.ndim == 1, tensor.name in ("token_embd.weight", "output.weight")
        expected = "F32" if vector else "Q8_0" if precise else kind.upper()
        assert tensor.tensor_type.name == expected, tensor.name
        scale = np.abs(exact[tensor.name]).max()
        assert np.abs(values - exact[tensor.name]).max() <= (most * scale if not vector else 0)
    reader = gguf.GGUFReader(file)
    name = gguf.LlamaFileType(reader.fields["general.file_type"].contents()).name
    assert name == f"MOSTLY_{kind.upper()}"


def test_rows_that_are_not_made_of_blocks_keep_their_numbers(tmp_path: Path) -> None:
    save_model(tmp_path / "b", T.LlamaConfig(**{**SHAPE, "hidden_size": 48}), tiny_tokenizer())
    file = tmp_path / "q.gguf"
    afina.export(base=str(tmp_path / "b"), format="gguf", outtype="q4_0", output=file, max_kl=5)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert types["blk.0.attn_q.weight"] == "F32"  # rows of 48
    assert types["blk.0.ffn_down.weight"] == "Q4_0"  # rows of 96


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_llama_cpp_computes_blocks(kind: str, exported: Any, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder, _, _ = exported("llama")
    file = tmp_path / "q.gguf"
    afina.export(folder / "lora", format="gguf", outtype=kind, output=file, max_kl=5)
    base = load_base(str(folder / "base"))
    from afina.merging.gguf import read_back
    from afina.merging.gguf_architecture import gguf_architecture

    read_back(base, gguf_architecture(base.model.config, base.name), file)
    tokens = list(range(30, 54))
    run = torch.tensor(tokens), torch.arange(24), (0, 24)
    ours, theirs = logits(base, run).numpy(), llama_logits(file, tokens)
    assert np.abs(ours - theirs).max() < 0.2  # llama.cpp rounds activations to 8 bits too
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.9


# ---- what llama.cpp would compute otherwise


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (lambda: T.Gemma2Config(**SHAPE, **GEMMA2, hidden_activation="gelu"), "activation"),
        (lambda: T.Gemma2Config(**SHAPE, **{**GEMMA2, "head_dim": 16}), "query_pre_attn_scalar"),
        (lambda: T.Gemma2Config(**SHAPE, **GEMMA2, layer_types=["full_attention"] * 2), "window"),
        (lambda: T.Gemma2Config(**SHAPE, **GEMMA2, attn_logit_softcapping=None), "softcapping"),
        (lambda: T.Gemma3TextConfig(**SHAPE, **GEMMA3, final_logit_softcapping=3.0), "softcapp"),
        (lambda: T.Phi3Config(**SHAPE, sliding_window=32), "sliding window of 32"),
        (lambda: T.CohereConfig(**SHAPE, use_qk_norm=True), "use_qk_norm"),
        (lambda: T.GemmaConfig(**SHAPE, tie_word_embeddings=False), "output layer"),
        (lambda: T.Olmo2Config(**SHAPE, attention_bias=True), "no tensor for"),
    ],
)
def test_configurations_that_are_refused(
    config: Callable[[], Any], why: str, tmp_path: Path
) -> None:
    save_model(tmp_path / "b", config(), tiny_tokenizer())
    with pytest.raises(BaseError, match=why):
        afina.export(base=str(tmp_path / "b"), format="gguf", output=tmp_path / "o")
    assert not (tmp_path / "o").exists()


# ---- tokenizers


def pieces(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A SentencePiece tokenizer with all pairs of its pieces, as those of Llama, Gemma, Mistral and Phi-3."""
    marks = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    core.normalizer = {
        "llama": normalizers.Sequence([normalizers.Prepend("\u2581"), replace]),
        "phi3": normalizers.Sequence([normalizers.Prepend("\u2581"), replace]),
        "gemma": replace,
    }.get(kind)
    core.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=marks, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    vocab = core.get_vocab()
    learned = sorted(set(vocab) - set(marks), key=lambda text: vocab[text])
    pairs = [
        (text[:at], text[at:])
        for text in learned
        for at in range(1, len(text))
        if text[:at] in vocab and text[at:] in vocab
    ]
    core.model = models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    core.pre_tokenizer = {
        "first": pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        "always": pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
        "gemma": pre_tokenizers.Split(" ", "merged_with_previous"),
    }.get(kind)  # type: ignore[assignment]
    content = json.loads(core.to_str())
    for token in content["added_tokens"]:
        token["rstrip"] = kind == "phi3" and token["content"] == "</s>"
    content["added_tokens"] = content["added_tokens"][:3]
    if kind == "phi3":
        marks = {"special": True, "normalized": False, "single_word": False, "lstrip": False}
        end = {"id": 420, "content": "<|end|>", "rstrip": True} | marks
        plain = {"id": 421, "content": "<|endoftext|>", "rstrip": False} | marks
        content["added_tokens"] += [end, plain]
    core = Tokenizer.from_str(json.dumps(content))
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = template
    return made


def split_by(pattern: str, ignore: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that cuts text by a pattern."""
    core = tiny_tokenizer().backend_tokenizer
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    content = json.loads(core.to_str())
    content["model"]["ignore_merges"] = ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama": lambda: pieces("llama"),
    "always": lambda: pieces("always"),
    "first": lambda: pieces("first"),
    "gemma": lambda: pieces("gemma"),
    "phi3": lambda: pieces("phi3"),
    "gpt-2": tiny_tokenizer,
    "llama-bpe": lambda: split_by(WORDS % r"\p{N}{1,3}", True),
    "qwen2": lambda: split_by(WORDS % r"\p{N}", False),
    "gpt-4o": lambda: split_by(GPT4O, False),
    "tekken": lambda: split_by(TEKKEN, True),
}
SPM = ("llama", "always", "first", "gemma", "phi3")


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """(tokenizer, GGUF of a model with it)"""
    known: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            tokenizer = TOKENIZERS[name]()
            shape = {**SHAPE, "vocab_size": 430, "num_hidden_layers": 1}
            kind = T.Phi3Config if name == "phi3" else T.LlamaConfig
            save_model(folder / "b", kind(**shape), tokenizer)
            afina.export(base=str(folder / "b"), format="gguf", output=folder / "m.gguf")
            known[name] = tokenizer, folder / "m.gguf"
        return known[name]

    return make


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_in_the_file(name: str, vocabularies: Any) -> None:
    tokenizer, file = vocabularies(name)
    told = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    assert told["tokenizer.ggml.model"] == ("llama" if name in SPM else "gpt2")
    assert told["tokenizer.ggml.pre"] == ("default" if name in SPM else name)
    texts = told["tokenizer.ggml.tokens"]
    assert all(texts[number] == text for text, number in tokenizer.get_vocab().items())
    if name in SPM:
        kinds = told["tokenizer.ggml.token_type"]
        assert kinds[:3] == [2, 3, 3] and kinds[3:259] == [6] * 256 and kinds[259] == 1
        prefixed = name in ("llama", "always", "first", "phi3")
        assert told["tokenizer.ggml.add_space_prefix"] == prefixed
        assert len(set(told["tokenizer.ggml.scores"])) > 50
    if name == "phi3":
        assert "phi-3" in told["general.name"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_splits_text_as_the_tokenizer(name: str, vocabularies: Any) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    tokenizer, file = vocabularies(name)
    reader = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in (*TEXTS, *CORPUS):
        text = (
            text.lstrip() if name in ("first", "always") else text
        )  # there no second space is added
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert reader.tokenize(text.encode(), add_bos=False) == expected, text
    marked = "<s>The old</s>\n house"
    if name != "first":  # there a space is added at the very beginning only
        expected = tokenizer(marked, add_special_tokens=False)["input_ids"]
        assert reader.tokenize(marked.encode(), add_bos=False, special=True) == expected


def test_a_space_at_the_very_beginning_only_is_left_out_of_chats(tmp_path: Path) -> None:
    """A chat begins with a special token, after which transformers adds none."""
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    shape = {**SHAPE, "vocab_size": 430, "num_hidden_layers": 1}
    save_model(tmp_path / "b", T.LlamaConfig(**shape), pieces("first", template))
    afina.export(base=str(tmp_path / "b"), format="gguf", output=tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.update(normalizer={"type": "NFKC"}), "none of SentencePiece's"),
        (lambda c: c["model"]["vocab"].pop("<0x41>"), "no token for each byte"),
        (lambda c: c["model"].update(merges=c["model"]["merges"][:30]), "would split"),
    ],
)
def test_pieces_that_llama_cpp_would_join_otherwise(
    change: Callable[[Any], Any], why: str, tmp_path: Path
) -> None:
    content = json.loads(pieces("gemma").backend_tokenizer.to_str())
    change(content)
    core = Tokenizer.from_str(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    shape = {**SHAPE, "vocab_size": 430, "num_hidden_layers": 1}
    save_model(tmp_path / "b", T.LlamaConfig(**shape), tokenizer)
    with pytest.raises(BaseError, match=why):
        afina.export(base=str(tmp_path / "b"), format="gguf", output=tmp_path / "o.gguf")

"""GGUF files: read back number by number, by transformers' own reader, and by llama.cpp where it is installed."""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import afina
from afina.adapters.saving import save_adapter
from afina.cli.main import run as command_line
from afina.data.renderer import Renderer
from afina.errors import AfinaError, BaseError, MergeError, SettingsError
from afina.io.chat_format import ChatFormat
from afina.merging.chat_export import PROBE_CHAT
from afina.merging.gguf_tokenizer import WORDS, portable, rules
from afina.merging.merge_into_base import merge_into_base
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from helpers import TEMPLATE, flat_run, logits, put, save_model, state, tiny_tokenizer

SHAPE = dict(
    vocab_size=324,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=192,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True),
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama3": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=128, tie_word_embeddings=True),
}
PLACES = {  # our layers' names and llama.cpp's, written down apart from the gguf package
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def made(folder: Path, config: Any, tokenizer: Any = None) -> tuple[str, Path]:
    """A random model of the configuration, and a random rsLoRA on it with ranks and strengths of their own."""
    name = str(save_model(folder / "base", config, tokenizer or tiny_tokenizer()))
    base = load_base(name)
    ranks, alphas = (
        {"model.layers.0.self_attn.q_proj": 5},
        {"model.layers.1.self_attn.k_proj": 3.0, "model.layers.1.mlp.up_proj": 0.0},
    )
    save_adapter(
        put(base, rank=4, alpha=8.0, scaling="rslora", rank_pattern=ranks, alpha_pattern=alphas),
        base,
        folder / "lora",
    )
    return name, folder / "lora"


def merged_state(name: str, lora: Path) -> dict[str, Tensor]:
    base = load_base(name)
    merge_into_base(base, afina.load_adapter(lora, base))
    return state(base.model)


def place(name: str) -> str:
    path, _, kind = name.rpartition(".")
    if path.startswith("model.layers."):
        _, _, number, layer = path.split(".", 3)
        return f"blk.{number}.{PLACES[layer]}.{kind}"
    return f"{PLACES[path]}.{kind}"


def in_our_order(values: np.ndarray, name: str, config: Any) -> np.ndarray:
    """Rows of the query and key layers of the llama family back where transformers has them, by their definition."""
    layer = name.split(".")[-2]
    if config.model_type not in ("llama", "mistral") or layer not in ("q_proj", "k_proj"):
        return values
    heads = config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads
    size, ours = len(values) // heads, np.empty_like(values)
    for head in range(heads):
        for pair in range(size // 2):
            for half in range(2):
                ours[head * size + half * size // 2 + pair] = values[head * size + 2 * pair + half]
    return ours


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """(what the file says, tensors in their torch shape, their types)"""
    reader = gguf.GGUFReader(file)
    told = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1])
        for t in reader.tensors
    }
    return told, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_every_weight_of_the_merged_model(family: str, tmp_path: Path) -> None:
    config = CONFIGS[family]
    name, lora = made(tmp_path, config)
    result = afina.export(lora, format="gguf", output=tmp_path / "whole.gguf")
    assert result["kl"] < 1e-5 and result["weights"] == "f32"
    told, tensors, types = read(tmp_path / "whole.gguf")
    expected = merged_state(name, lora)
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    extra = {"rope_freqs.weight"} if family == "llama3" else set()
    assert {place(name) for name in expected} | extra == set(tensors)
    for name, tensor in expected.items():
        assert np.array_equal(in_our_order(tensors[place(name)], name, config), tensor.numpy()), (
            name
        )
    assert set(types.values()) == {"F32"}
    arch = "llama" if family in ("llama", "tied", "llama3", "mistral") else family
    shape = {
        "context_length": 192,
        "embedding_length": 48,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 128 if family == "qwen3" else 12,
        "rope.dimension_count": 128 if family == "qwen3" else 12,
        "rope.freq_base": 10000.0,
        "vocab_size": 324,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
    }
    assert told["general.architecture"] == arch and told["general.type"] == "model"
    assert {key: told[f"{arch}.{key}"] for key in shape} == shape
    assert told["afina.adapter"] == json.loads((lora / "afina.json").read_text())["hash"]


def test_frequencies_of_llama3(tmp_path: Path) -> None:
    """The factors are the plain frequencies over those that transformers turns by: 1 for short waves, 8 for long ones."""
    name, lora = made(tmp_path, CONFIGS["llama3"])
    afina.export(lora, format="gguf", output=tmp_path / "whole.gguf")
    factors = read(tmp_path / "whole.gguf")[1]["rope_freqs.weight"]
    plain = 10000.0 ** (-np.arange(6) / 6)
    assert np.allclose(
        plain / factors, load_base(name).model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6
    )
    assert (
        factors[0] == pytest.approx(1.0)
        and factors[2:] == pytest.approx(8.0, rel=1e-5)
        and 1 < factors[1] < 8
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tied", "mistral", "qwen2", "qwen3"])
def test_a_reader_that_is_not_ours_gives_our_logits(family: str, tmp_path: Path) -> None:
    name, lora = made(tmp_path, CONFIGS[family])
    afina.export(lora, format="gguf", output=tmp_path / "gguf")
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32
    )
    base = load_base(name)
    merge_into_base(base, afina.load_adapter(lora, base))
    run = flat_run((17,))
    with torch.no_grad():
        given = other(run[0][None]).logits[0]
    assert torch.allclose(given, logits(base, run), atol=1e-4)


@pytest.mark.parametrize(("weights", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_sixteen_bits(tiny: Path, tmp_path: Path, weights: str, dtype: torch.dtype) -> None:
    afina.export(
        base=str(tiny), format="gguf", outtype=weights, output=tmp_path / "base.gguf", max_kl=0.1
    )
    _, tensors, types = read(tmp_path / "base.gguf")
    for name, tensor in load_base(str(tiny)).model.state_dict().items():
        kept = tensor.to(dtype).float() if tensor.ndim > 1 else tensor
        assert np.array_equal(
            in_our_order(tensors[place(name)], name, CONFIGS["tied"]), kept.numpy()
        ), name
        assert types[place(name)] == (weights.upper() if tensor.ndim > 1 else "F32")


def test_weights_that_do_not_fit_leave_nothing_behind(tmp_path: Path) -> None:
    save_model(tmp_path / "base", CONFIGS["tied"], tiny_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 1e6  # float16 ends at 65,504
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(MergeError, match="differs from the adapted one"):
        afina.export(
            base=str(tmp_path / "base"), format="gguf", outtype="f16", output=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_factors_of_a_lora(family: str, tmp_path: Path) -> None:
    config = CONFIGS[family]
    name, lora = made(tmp_path, config)
    assert (
        command_line(
            ["export", str(lora), "--format", "gguf-lora", "--output", str(tmp_path / "lora.gguf")]
        )
        == 0
    )
    told, tensors, types = read(tmp_path / "lora.gguf")
    assert (told["general.type"], told["adapter.type"], told["general.architecture"]) == (
        "adapter",
        "lora",
        family,
    )
    assert set(types.values()) == {"F32"}
    base = load_base(name)
    adapter = afina.load_adapter(lora, base)
    assert set(tensors) == {
        f"{place(path + '.weight')}.lora_{half}" for path in adapter.layers for half in "ab"
    }
    for path, delta in adapter.layers.items():
        a, b = (
            tensors[f"{place(path + '.weight')}.lora_{half}"].astype(np.float64) for half in "ab"
        )
        update = in_our_order(told["adapter.lora.alpha"] / len(a) * b @ a, f"{path}.weight", config)
        expected = (
            delta.merged_weight(torch.zeros(update.shape, dtype=torch.float64)).detach().numpy()
        )
        assert np.allclose(
            update, expected, rtol=0, atol=1e-7 * max(1.0, np.abs(expected).max())
        ), path


@pytest.mark.parametrize(("scaling", "alpha"), [("lora", 32.0), ("rslora", 64.0), ("lora", 0.0)])
def test_the_same_strength_everywhere_is_told_and_not_folded(
    tied: Path, tmp_path: Path, scaling: str, alpha: float
) -> None:
    """B stays as it was learned, and alpha / r of the file is the real scale: of rsLoRA alpha / sqrt(r)."""
    base = load_base(str(tied))
    adapter = put(
        base, rank=16, alpha=alpha and 32.0 if scaling == "lora" else 16.0, scaling=scaling
    )
    save_adapter(adapter, base, tmp_path / "lora")
    assert (
        afina.export(tmp_path / "lora", format="gguf-lora", output=tmp_path / "out")["alpha"]
        == alpha
    )
    told, tensors, _ = read(tmp_path / "out" / "adapter.gguf")
    b = tensors["blk.3.ffn_up.weight.lora_b"]
    learned = adapter.layers["model.layers.3.mlp.up_proj"].b.detach().numpy()
    assert told["adapter.lora.alpha"] == alpha
    assert np.array_equal(
        b, learned if alpha else np.zeros_like(learned)
    )  # llama.cpp scales by 1 where alpha is 0


# ---- the tokenizer


def test_tokens_merges_and_template(tiny: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(
        TEMPLATE.replace(
            "{{ m['content'] }}", "{%- generation %}\n{{ m['content'] }}{% endgeneration %}"
        )
    )
    tokenizer.add_tokens(["<|mine|>"])
    save_model(tmp_path / "base", LlamaConfig(**SHAPE), tokenizer)
    afina.export(base=str(tmp_path / "base"), format="gguf", output=tmp_path / "base.gguf")
    told, _, _ = read(tmp_path / "base.gguf")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = {text: number for number, text in enumerate(told["tokenizer.ggml.tokens"])}
    assert (
        model["vocab"].items() <= vocabulary.items()
        and vocabulary["<|mine|>"] == 320
        and len(vocabulary) == 324
    )
    assert told["tokenizer.ggml.token_type"] == [3, 3, 3] + [1] * 317 + [4] + [5] * 3
    assert told["tokenizer.ggml.merges"] == [" ".join(pair) for pair in model["merges"]]
    assert (told["tokenizer.ggml.model"], told["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert [told[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")] == [1, 2]
    assert [told[f"tokenizer.ggml.add_{name}_token"] for name in ("bos", "eos")] == [False, False]
    assert "generation %}" not in told["tokenizer.chat_template"].replace("add_generation", "")


def test_a_portable_template_writes_the_same() -> None:
    marked = TEMPLATE.replace(
        "{{ m['content'] }}", "{%- generation -%}\n {{ m['content'] }}{% endgeneration %}\n"
    )
    chat = [{"role": "user", "content": "sol"}, {"role": "assistant", "content": "mar\n"}]
    written = [
        tiny_tokenizer(t).apply_chat_template(chat, tokenize=False)
        for t in (marked, portable(marked))
    ]
    assert (
        written[0] == written[1] and "mar" in written[0] and portable(marked).count("if true") == 1
    )
    assert portable(TEMPLATE) == TEMPLATE


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("cuts", "ignore", "name"),
    [
        (
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
            False,
            "smollm",
        ),
        (
            [pre_tokenizers.Split(Regex(WORDS % r"\p{N}{1,3}"), "isolated"), BYTES],
            True,
            "llama-bpe",
        ),
        ([pre_tokenizers.Split(Regex(WORDS % r"\p{N}"), "isolated"), BYTES], False, "qwen2"),
        ([pre_tokenizers.Split(Regex(WORDS % r"\p{N}"), "isolated"), BYTES], True, None),
        (
            [pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)],
            False,
            None,
        ),
        ([pre_tokenizers.Metaspace()], False, None),
    ],
)
def test_names_of_the_cuts(cuts: list[Any], ignore: bool, name: str | None) -> None:
    core = tiny_tokenizer().backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    whole = json.loads(core.to_str())
    whole["model"]["ignore_merges"] = ignore
    if name is not None:
        assert rules(whole, "here") == name
    else:
        with pytest.raises(BaseError, match="llama.cpp has no name for its pre-tokenizer"):
            rules(whole, "here")


def test_tokenizers_that_are_read_otherwise_there() -> None:
    core = tiny_tokenizer().backend_tokenizer
    core.normalizer = normalizers.Lowercase()
    with pytest.raises(BaseError, match="no byte-level BPE"):
        rules(json.loads(core.to_str()), "here")
    whole = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    whole["added_tokens"][0]["lstrip"] = True
    with pytest.raises(BaseError, match="has lstrip"):
        rules(whole, "here")


# ---- what is refused


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "its activation is 'gelu'"),
        (MistralConfig(**SHAPE, sliding_window=64), "a sliding window of 64 tokens"),
        (
            LlamaConfig(
                **SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "of the kind 'dynamic'",
        ),
        (
            Qwen2Config(
                **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
            ),
            "of the kind 'linear'",
        ),
    ],
)
def test_bases_that_llama_cpp_would_read_otherwise(config: Any, why: str, tmp_path: Path) -> None:
    name, lora = made(tmp_path, config)
    for form in ("gguf", "gguf-lora"):
        with pytest.raises(BaseError, match=why):
            afina.export(lora, base=name, format=form, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_families_that_are_not_known(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import GPT2Config

    save_model(
        tmp_path / "base",
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64),
        tokenizer,
    )
    with pytest.raises(BaseError, match="its family is 'gpt2'; known are llama, mistral"):
        afina.export(base=str(tmp_path / "base"), format="gguf", output=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "mora", "full"])
def test_methods_that_llama_cpp_does_not_know(tied: Path, tmp_path: Path, method: str) -> None:
    base = load_base(str(tied))
    save_adapter(put(base, method=method, rank=2), base, tmp_path / "a")
    with pytest.raises(MergeError, match="low-rank updates only") as caught:
        afina.export(tmp_path / "a", format="gguf-lora", output=tmp_path / "out")
    assert "afina extract" in str(caught.value) and "--format gguf" in str(caught.value)
    assert (
        afina.export(tmp_path / "a", format="gguf", output=tmp_path / "out")["kl"] < 1e-5
    )  # and the way out works
    if method == "dora":  # so does the other one
        assert (
            afina.extract(tmp_path / "a", max_rank=3, output_dir=tmp_path / "lora")["rank"]["most"]
            <= 3
        )
        assert (
            afina.export(tmp_path / "lora", format="gguf-lora", output=tmp_path / "lora.gguf")[
                "layers"
            ]
            == 28
        )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(target_modules=["embed_tokens"]), "model.embed_tokens is adapted"),
        (dict(target_modules=["lm_head"]), "lm_head is adapted"),
        (dict(invocation=(5, 6)), "an activated adapter"),
    ],
)
def test_adapters_that_act_where_llama_cpp_does_not(
    tied: Path, tmp_path: Path, spec: Any, message: str
) -> None:
    base = load_base(str(tied))
    save_adapter(put(base, rank=2, **spec), base, tmp_path / "a")
    with pytest.raises(AfinaError, match=message):
        afina.export(tmp_path / "a", format="gguf-lora", output=tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.slow
def test_several_adapters_are_not_one(tied: Path, tmp_path: Path) -> None:
    base = load_base(str(tied))
    for name in "ab":
        save_adapter(put(base, name, rank=2, seed=ord(name)), base, tmp_path / name)
    for run in (f"{tmp_path / 'a'}:0.5", f"{tmp_path / 'a'}:1,{tmp_path / 'b'}:1"):
        for form in ("gguf", "gguf-lora"):
            with pytest.raises(AfinaError, match="these are several, or weighted"):
                afina.export(run, format=form, output=tmp_path / "x.gguf")
    for form in ("gguf", "gguf-lora"):
        told = afina.export(f"{tmp_path / 'a'}:1", format=form, output=tmp_path / form)["adapter"]
        assert told == json.loads((tmp_path / "a" / "afina.json").read_text())["hash"]


def test_wrong_settings(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(str(tiny))
    save_adapter(put(base, rank=2), base, tmp_path / "a")
    (tmp_path / "there.gguf").write_text("mine")
    for values, message in (
        (dict(format="gguf", output=tmp_path / "there.gguf"), "exists already"),
        (dict(format="gguf", output=tmp_path / "a"), "not empty"),
        (
            dict(format="gguf", output=tmp_path / "x", quantization="nf4"),
            "quantization has no effect on",
        ),
        (
            dict(format="gguf-lora", output=tmp_path / "x", outtype="f16"),
            "outtype has no effect on",
        ),
        (
            dict(format="hf", output=tmp_path / "x", outtype="f16"),
            "outtype has no effect on --format hf",
        ),
    ):
        with pytest.raises(SettingsError, match=message):
            afina.export(tmp_path / "a", **values)
    for form in ("hf", "peft", "gguf-lora"):
        with pytest.raises(SettingsError, match="no adapter is given"):
            afina.export(format=form, output=tmp_path / "x")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for form in ("gguf", "gguf-lora"):
        with pytest.raises(SettingsError, match="gguf is not installed") as caught:
            afina.export(tmp_path / "a", format=form, output=tmp_path / "x")
        assert caught.value.hint == "pip install 'afina[gguf]'"
    assert (tmp_path / "there.gguf").read_text() == "mine" and not (tmp_path / "x").exists()


# ---- llama.cpp itself

TEXTS = (
    "The house by the road was old; in 1984 it wasn't ours yet.",
    "  two spaces,\n\na new line\tand a tab \n",
    "¿Dónde está el niño? —preguntó la señora, a las 10:45.",
    "El pingüino comió 3,5 kg de jamón… ¡qué barbaridad! 日本 🙂",
)
PROMPTS = ("She go to the school every day.", "Los niño juega en el parque.", "I has two cats.")


def theirs(file: Path, prompts: list[list[int]], lora: Path | None = None) -> list[list[int]]:
    """llama.cpp's likeliest 24 tokens after each prompt, given as tokens."""
    from llama_cpp import Llama

    full = {
        "type_k": 0,
        "type_v": 0,
    }  # keys and values in float32; by default they are rounded to 16 bits
    model = Llama(
        str(file), n_ctx=256, n_threads=1, verbose=False, lora_path=lora and str(lora), **full
    )
    return [
        list(islice(model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0), 24))
        for prompt in prompts
    ]


def ours(base: CausalLM, prompts: list[list[int]]) -> list[list[int]]:
    """The same by the whole forward at each step."""
    answers = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(24):
            run = torch.tensor(tokens), torch.arange(len(tokens)), (0, len(tokens))
            tokens.append(int(logits(base, run)[-1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


def test_llama_cpp_answers_as_we_do(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    base = load_base("embedded", dtype="float32")
    adapter = put(
        base, rank=4, scaling="rslora", rank_pattern={"model.layers.0.self_attn.q_proj": 7}
    )
    save_adapter(adapter, base, tmp_path / "a")
    files = {name: tmp_path / f"{name}.gguf" for name in ("base", "merged", "lora")}
    afina.export(base="embedded", dtype="float32", format="gguf", output=files["base"])
    afina.export(tmp_path / "a", dtype="float32", format="gguf", output=files["merged"])
    afina.export(tmp_path / "a", format="gguf-lora", output=files["lora"])
    reader = llama_cpp.Llama(str(files["base"]), vocab_only=True, verbose=False)
    for text in TEXTS:
        assert reader.tokenize(text.encode(), add_bos=True) == base.tokenizer(text)["input_ids"], (
            text
        )
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    prompts = [
        list(base.tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"])
        for c in chats
    ]
    merge_into_base(base, adapter)
    adapted, alone = ours(base, prompts), ours(load_base("embedded", dtype="float32"), prompts)
    assert theirs(files["base"], prompts) == alone != adapted
    assert theirs(files["merged"], prompts) == adapted
    assert theirs(files["base"], prompts, files["lora"]) == adapted


# ---- how a run was asked


ASKED = "{% if loud is defined and loud %}LOUD {% endif %}" + TEMPLATE.replace(
    "{{ eos_token }}", "<|mine|>"
)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, "plain", "file"])
def test_exits_are_asked_as_the_run(asked: str | None, tmp_path: Path) -> None:
    """Template, arguments and stop tokens of the run travel with each exit."""
    tokenizer = tiny_tokenizer(TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mine|>"]})
    save_model(tmp_path / "base", LlamaConfig(**SHAPE), tokenizer)
    base = load_base(str(tmp_path / "base"))
    (tmp_path / "own.jinja").write_text(ASKED)
    template = str(tmp_path / "own.jinja") if asked == "file" else asked
    arguments = {"loud": True} if asked == "file" else {}
    renderer = Renderer(base.tokenizer, ChatFormat(template, arguments), 128)
    record = {"chat": renderer.chat_format.record()}
    save_adapter(put(base, rank=2), base, tmp_path / "a", record)
    expected, stops = renderer.prompt(PROBE_CHAT), renderer.stop_token_ids

    afina.merge(tmp_path / "a", output_dir=tmp_path / "merged")
    afina.export(tmp_path / "a", format="peft", output=tmp_path / "peft")
    for folder in ("merged", "peft"):
        found = AutoTokenizer.from_pretrained(tmp_path / folder)
        ids = found.apply_chat_template(list(PROBE_CHAT), add_generation_prompt=True)["input_ids"]
        assert list(ids) == expected, folder
    config = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    ends = config["eos_token_id"]
    assert stops <= set(ends if isinstance(ends, list) else [ends])

    afina.export(tmp_path / "a", format="gguf", output=tmp_path / "m.gguf")
    afina.export(tmp_path / "a", format="gguf-lora", output=tmp_path / "l.gguf")
    for file in ("m.gguf", "l.gguf"):
        written = read(tmp_path / file)[0]["tokenizer.chat_template"]
        other = Renderer(base.tokenizer, ChatFormat(jinja=written), 128)
        assert other.prompt(PROBE_CHAT) == expected, file
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot")]
    told = read(tmp_path / "m.gguf")[0]
    assert stops <= {told.get(key) for key in keys}

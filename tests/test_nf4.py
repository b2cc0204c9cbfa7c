"""NF4: the published codes and errors, any width, exact layers, streamed loading, the cache, 8-bit moments."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from afina.adapters.segments import Segments
from afina.adapters.target_module import TargetModule
from afina.errors import BaseError
from afina.io.hashing import hash_tensor_files
from afina.kernels.int8_blockwise import dequantize8, dynamic_levels, quantize8
from afina.kernels.nf4 import (
    LEVELS,
    MAX_CODE_ROWS,
    NF4Weight,
    decode,
    dequantize,
    encode,
    errors,
    nf4_linear,
    quantize,
)
from afina.models import nf4_loading as nf4_load
from afina.models.loading import load_base
from afina.models.nf4 import (
    LayerQuantization,
    NF4Linear,
    quantizable_experts,
    quantizable_modules,
    quantize_model,
)
from afina.training.setup.adamw_8bit import AdamW8bit
from helpers import (
    ENVIRONMENT,
    SHARED,
    flat_run,
    logits,
    put,
    random_model,
    same,
    save_model,
    state,
    tiny_tokenizer,
)

# bitsandbytes' functional.py and tests/test_functional.py at 95f9af30: mean and standard deviation of the error of one
# matrix torch.randn(1024, 1024), absolute and relative, by block
PUBLISHED = {
    32: ((0.067746, 6.9e-05), (0.189726, 0.000304)),
    64: ((0.072798, 7.4e-05), (0.203339, 0.00034)),
    256: ((0.080337, 0.000102), (0.226105, 0.000398)),
    1024: ((0.08661, 0.000187), (0.24537, 0.0006)),
}
WIDTHS = (288, 1, 63, 64, 65, 4096)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nf4"


def linear(
    rows: int, width: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> nn.Linear:
    return nn.Linear(width, rows, bias).to(dtype).requires_grad_(False)


# ---- the numbers


def test_levels_are_the_published_ones() -> None:
    if (file := SHARED / "data" / "ref-vectors" / "nf4.json").is_file():
        told = json.loads(file.read_text())
        assert torch.equal(torch.tensor(told["nf4_codebook"]), torch.tensor(LEVELS))
        for block, ((error, _), (relative, _)) in PUBLISHED.items():
            by_block = told["err_mean_std_randn_1024x1024_by_blocksize"]["nf4"]
            assert (by_block["err"][str(block)][0], by_block["rel_err"][str(block)][0]) == (
                error,
                relative,
            )
    # quantiles of the normal distribution, evenly spaced on each side of zero, scaled to -1 .. 1
    normal = torch.distributions.Normal(
        torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    )
    offset = 1 - (1 / 30 + 1 / 32) / 2
    low = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    high = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    levels = torch.cat([low, torch.zeros(1, dtype=torch.float64), high]).sort().values / high.max()
    torch.testing.assert_close(levels, torch.tensor(LEVELS, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("block", PUBLISHED)
def test_errors_are_the_published_ones(block: int) -> None:
    absolute, relative = [], []
    for seed in range(4):
        weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(seed))
        lost = (decode(*encode(weight, block), 1024, torch.float32, block) - weight).abs()
        absolute.append(lost.mean())
        relative.append((lost / (weight.abs() + 1e-8)).mean())
    for figures, (mean, deviation) in zip((absolute, relative), PUBLISHED[block], strict=True):
        assert abs(float(torch.stack(figures).mean()) - mean) < 3 * deviation


def test_gaussian_error_and_bits_at_4096() -> None:
    weight = torch.randn(4096, 4096)
    quantized = quantize(weight)
    relative, zeros = errors(weight, quantized)
    assert abs(relative**2 - 0.00846) < 3e-5
    assert (
        abs(zeros - 0.088) < 1e-3
    )  # a normally distributed weight below the middle of the first level
    stored = (quantized.codes, quantized.scales, quantized.superscales, quantized.offset)
    assert (
        abs(8 * sum(t.numel() * t.element_size() for t in stored) / weight.numel() - 4.127) < 1e-3
    )
    assert abs(quantized.bits - 4.127) < 1e-3


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_width_takes_the_nearest_level_of_each_row(width: int, dtype: torch.dtype) -> None:
    weight = torch.randn(70, width).to(dtype)
    codes, absmax = encode(weight)
    assert codes.shape == (70, -(-width // 2))
    assert absmax.shape == (70, -(-width // 64))
    scales = absmax.repeat_interleave(64, 1)[:, :width]
    distance = (
        weight.float()[..., None] / scales[..., None] - torch.tensor(LEVELS)
    ).abs()  # (70, width, 16)
    chosen = torch.stack([codes >> 4, codes & 15], 2).flatten(1)[:, :width].long()
    torch.testing.assert_close(
        distance.gather(2, chosen[..., None])[..., 0], distance.amin(2), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        decode(codes, absmax, width, torch.float32), torch.tensor(LEVELS)[chosen] * scales
    )
    for row in (0, 69):  # a row stands alone
        assert torch.equal(encode(weight[row : row + 1])[0][0], codes[row])
    quantized = quantize(weight)
    assert dequantize(quantized, dtype).dtype == dtype
    assert torch.equal(dequantize(quantized, torch.float32).to(dtype), dequantize(quantized, dtype))
    if width > 1:
        assert errors(weight, quantized)[0] < 0.11


def test_half_way_between_two_levels_the_lower_one_is_taken() -> None:
    levels = torch.tensor(LEVELS)
    middles = (levels[:-1] + levels[1:]) / 2
    weight = torch.cat([middles, torch.ones(1)])[None]
    codes, _ = encode(weight)
    assert torch.stack([codes >> 4, codes & 15], 2).flatten().tolist() == [*range(15), 15]


def test_zeros_stay_zeros_and_what_is_not_finite_is_refused() -> None:
    weight = torch.randn(8, 128)
    weight[:, :64] = 0
    assert (dequantize(quantize(weight), torch.float32)[:, :64] == 0).all()
    assert errors(weight, quantize(weight))[1] < 0.1
    assert errors(torch.zeros(2, 2), quantize(torch.zeros(2, 2))) == (0.0, 0.0)
    for bad in (
        torch.full((2, 2), float("nan")),
        torch.full((2, 2), float("inf")),
        torch.zeros(0, 4),
        torch.zeros(4),
    ):
        with pytest.raises(ValueError, match=r"NaN|NF4 holds matrices"):
            quantize(bad)
    with pytest.raises(BaseError, match="NaN or infinite"):
        NF4Linear.from_linear(
            nn.Linear(2, 2).apply(lambda m: nn.init.constant_(m.weight, float("nan")))
        )


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_levels_follow_their_construction(signed: bool) -> None:
    levels = dynamic_levels(signed)
    assert len(levels.unique()) == 256
    assert levels.max() == 1
    assert (levels == 0).sum() == 1
    assert torch.equal(levels[1:127], -levels[128:254].flip(0)) if signed else levels.min() == 0
    top = levels[levels > 0.1]
    assert len(top) == (65 if signed else 129)  # 64 or 128 parts of the highest decade, and 1


@pytest.mark.parametrize("length", [1, 255, 256, 1000])
def test_eight_bits_take_the_nearest_level(length: int) -> None:
    x, levels = torch.randn(length) * torch.logspace(-4, 0, length), dynamic_levels(True)
    codes, scales = quantize8(x, levels)
    back = dequantize8(codes, scales, levels)
    assert back.shape == x.shape
    scale = scales.repeat_interleave(256)[:length]
    best = (x[:, None] / scale[:, None] - levels).abs().amin(1) * scale
    torch.testing.assert_close((back - x).abs(), best, atol=1e-7, rtol=1e-4)


# ---- bitsandbytes


@pytest.mark.parametrize("shape", [(64, 64), (100, 320), (1000, 1024), (2048, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_to_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    theirs = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(theirs.create_dynamic_map(), dynamic_levels(True))
    assert torch.equal(theirs.create_dynamic_map(signed=False), dynamic_levels(False))
    weight = (torch.randn(shape) * 0.02).to(dtype)
    ours = quantize(weight)
    packed, about = theirs.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    assert torch.equal(packed.view(ours.codes.shape), ours.codes)
    assert torch.equal(about.offset.view(1), ours.offset)
    assert torch.equal(about.state2.absmax, ours.superscales)
    # its way for float64 looks for the nearest of the 256 levels; the one for float32 on a CPU takes a neighbour of it
    # in 0.2% of the blocks, by a table of 65,536 entries
    absmax = theirs.quantize_4bit(
        weight, blocksize=64, compress_statistics=False, quant_type="nf4"
    )[1].absmax
    exact, _ = torch.ops.bitsandbytes.quantize_blockwise.default(
        (absmax - about.offset).double(), about.state2.code, 256
    )
    assert torch.equal(exact.view(ours.scales.shape), ours.scales)
    assert (about.absmax.view(ours.scales.shape) == ours.scales).float().mean() > 0.99
    about.absmax = exact.flatten()
    torch.testing.assert_close(
        theirs.dequantize_4bit(packed, about), dequantize(ours, dtype), atol=1e-6, rtol=0
    )


def test_reads_what_bitsandbytes_wrote() -> None:
    theirs = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(512, 576)
    packed, about = theirs.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    codes, scales = packed.view(512, 288), about.absmax.view(512, 9)
    read = NF4Weight(codes, scales, about.state2.absmax, about.offset.view(1), 576)
    assert torch.equal(theirs.dequantize_4bit(packed, about), dequantize(read, torch.float32))


# ---- the layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 288), (33, 63), (96, 128)])
@pytest.mark.parametrize(
    "rows", [5, 40]
)  # few rows are multiplied by the codes, the C++ kernel adding up in its own order
def test_forward_and_backward_are_those_of_the_dense_layer(
    rows: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    held = NF4Linear.from_linear(linear(*shape, dtype))
    dense = held.to_linear()
    assert isinstance(dense, nn.Linear)
    assert torch.equal(dense.weight, held.weight)
    gradient = torch.randn(2, rows, shape[0]).to(dtype)
    results = []
    for layer in (held, dense):
        x = (
            torch.randn(2, rows, shape[1], generator=torch.Generator().manual_seed(3))
            .to(dtype)
            .requires_grad_()
        )
        y = layer(x)
        y.backward(gradient)
        results.append((y.detach(), x.grad))
    (y, grad), (dense_y, dense_grad) = results
    assert torch.equal(grad, dense_grad)
    if rows > MAX_CODE_ROWS:
        assert torch.equal(y, dense_y)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y, dense_y, atol=tolerance, rtol=tolerance)
    assert held(torch.zeros(shape[1], dtype=dtype)).shape == (shape[0],)


def test_gradients_by_finite_differences() -> None:
    weight, bias = (
        quantize(torch.randn(7, 70)),
        torch.randn(7, dtype=torch.float64, requires_grad=True),
    )
    x = torch.randn(2, 3, 70, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: nf4_linear(x, weight, b), (x, bias))


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    held, kept = NF4Linear.from_linear(linear(256, 256)), []
    stored = {p.data_ptr() for p in held.parameters()}  # they are kept as they are
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        held(torch.randn(2, 256, requires_grad=True)).sum().backward()
    assert sum(t.numel() for t in kept if t.data_ptr() not in stored) < 256 * 256 / 2


def test_conv1d_is_held_as_its_transpose() -> None:
    module = Conv1D(30, 70).requires_grad_(False)
    nn.init.normal_(module.bias)
    held, x = NF4Linear.from_linear(module), torch.randn(4, 70)
    assert (held.out_features, held.in_features) == (30, 70)
    assert torch.equal(held.weight, dequantize(quantize(module.weight.T), torch.float32))
    plain = held.to_linear()
    assert isinstance(plain, Conv1D)
    torch.testing.assert_close(plain(x), held(x))


def test_state_dict_copies_and_moves_between_dtypes() -> None:
    held, other = NF4Linear.from_linear(linear(20, 70)), NF4Linear.from_linear(linear(20, 70))
    twin = copy.deepcopy(held)
    assert same(state(twin), state(held))
    assert twin.codes is not held.codes
    other.load_state_dict(held.state_dict())
    assert torch.equal(other.weight, held.weight)
    weight = held.weight
    assert not any(p.requires_grad for p in held.parameters())
    half = held.to(torch.bfloat16)
    assert (half.superscales.dtype, half.offset.dtype, half.codes.dtype) == (
        torch.float32,
        torch.float32,
        torch.uint8,
    )
    assert half.bias is not None
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16
    assert torch.equal(half.weight, weight.to(torch.bfloat16))
    assert torch.equal(half.float().weight, weight)


def test_deltas_see_a_matrix() -> None:
    held = NF4Linear.from_linear(linear(20, 70, torch.bfloat16))
    layer, a = TargetModule("x", held), torch.randn(3, 70)
    assert layer.is_matrix
    assert (layer.in_features, layer.out_features, layer.device.type) == (70, 20, "cpu")
    assert torch.equal(layer.weight, held.weight)
    assert torch.equal(layer.multiply(a), a @ held.weight.float().T)


# ---- whole models


def test_only_the_blocks_are_quantised() -> None:
    model = random_model(
        T.LlamaConfig(
            vocab_size=99,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    before = state(model)
    told: list[LayerQuantization] = []
    report = quantize_model(model, report_module=told.append)
    assert report == told
    assert len(report) == 14
    assert {type(m) for m in model.modules()} >= {NF4Linear, nn.Linear}
    assert type(model.lm_head) is nn.Linear
    for done in report:
        held = model.get_submodule(done.path)
        weight = before[f"{done.path}.weight"]
        assert isinstance(held, NF4Linear)
        assert done.shape == tuple(weight.shape)
        assert done.bytes == held.quantized.nbytes
        assert done.relative_error == pytest.approx(
            float((held.weight - weight).norm() / weight.norm()), rel=1e-5
        )
        assert done.zeroed_ratio == pytest.approx(
            float(((held.weight == 0) & (weight != 0)).float().mean())
        )
    assert "error" in str(report[0])
    kept = {name: tensor for name, tensor in before.items() if name in model.state_dict()}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())
    with pytest.raises(BaseError, match="quantized already"):
        quantize_model(model)


SMALL = {
    "vocab_size": 320,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_hidden_layers": 2,
    "hidden_size": 40,
    "num_attention_heads": 4,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 72}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaConfig(**GROUPED),
    "llama, tied": lambda: T.LlamaConfig(
        **GROUPED, tie_word_embeddings=True, rope_parameters=LLAMA3
    ),
    "qwen2": lambda: T.Qwen2Config(**GROUPED),
    "gemma3": lambda: T.Gemma3TextConfig(**GROUPED, head_dim=12, sliding_window=5),
    "gpt2": lambda: T.GPT2Config(
        vocab_size=320, n_embd=40, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: T.OPTConfig(**SMALL, ffn_dim=72, word_embed_proj_dim=40),
    "gpt_neox: loaded whole": lambda: T.GPTNeoXConfig(**SMALL, intermediate_size=72),
    "mixtral: loaded whole": lambda: T.MixtralConfig(**GROUPED, num_local_experts=4),
    "falcon": lambda: T.FalconConfig(**SMALL, alibi=False),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_streamed_loading_equals_quantising_after_loading(
    name: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "model", MODELS[name](), tiny_tokenizer())
    kind = getattr(torch, dtype)
    base = load_base(str(folder), dtype=dtype, quantization="nf4")
    whole = "loaded whole" in name
    assert ("the entire model was loaded" in capsys.readouterr().err) == whole
    ordinary = load_base(str(folder), dtype=dtype)
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=kind if whole else torch.float32)
    assert quantize_model(source) == base.quantization_report
    for path in quantizable_modules(ordinary.model):
        parent, _, child = path.rpartition(".")
        setattr(ordinary.model.get_submodule(parent), child, source.get_submodule(path).to(kind))
    for path, (owner, name) in quantizable_experts(ordinary.model).items():
        source.get_submodule(path).to(kind).put(owner, name)
    assert same(state(base.model), state(ordinary.model))
    buffers = dict(ordinary.model.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in base.model.named_buffers())
    assert not any(p.requires_grad or p.is_meta for p in base.model.parameters())
    assert torch.equal(logits(base, flat_run((5, 9))), logits(ordinary, flat_run((5, 9))))
    tied = base.model.get_input_embeddings().weight is base.model.get_output_embeddings().weight
    assert tied == base.model.config.tie_word_embeddings
    assert base.hash == ordinary.hash == hash_tensor_files(base.files)
    assert (base.quantization, ordinary.quantization) == ("nf4", "none")
    assert base.model.generation_config.to_dict() == ordinary.model.generation_config.to_dict()


@pytest.mark.slow
def test_the_cache_is_used_and_rebuilt_when_damaged(
    tiny: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_base(str(tiny), quantization="nf4")
    lines = [line for line in capsys.readouterr().err.splitlines() if " error " in line]
    assert len(lines) == len(first.quantization_report) == 28
    assert "zeroed" in lines[0]
    expected, folder = (
        state(first.model),
        cache / first.hash,
    )  # copies: the files below it are going to be damaged
    part, about = folder / "part-000.safetensors", folder / "about.json"
    whole = part.read_bytes()

    def check(anew: bool) -> None:
        again = load_base(str(tiny), quantization="nf4")
        assert same(state(again.model), expected)
        assert again.quantization_report == first.quantization_report
        assert (" error " in capsys.readouterr().err) == anew
        assert part.read_bytes() == whole
        assert sorted(file.name for file in folder.iterdir()) == [
            "about.json",
            "part-000.safetensors",
        ]
        assert [file.name for file in cache.iterdir()] == [first.hash]

    check(anew=False)
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    for damage in (whole[:-10], bytes(flipped), b"", b"nonsense"):
        part.write_bytes(damage)
        check(anew=True)
    for damage in (b"", b"{}", b"[1]", about.read_bytes().replace(b'"format": 1', b'"format": 0')):
        about.write_bytes(damage)
        check(anew=True)
    part.unlink()
    check(anew=True)
    monkeypatch.setattr(nf4_load, "SHARD_BYTES", 3000)  # bytes: many files
    part.unlink()
    again = load_base(str(tiny), quantization="nf4")
    assert same(state(again.model), expected)
    assert len(list(folder.iterdir())) > 5
    capsys.readouterr()
    load_base(str(tiny), quantization="nf4")
    assert "nf4" not in capsys.readouterr().err


def test_another_choice_of_layers_makes_the_cache_anew(tiny: Path, cache: Path) -> None:
    first = load_base(str(tiny), quantization="nf4")
    model, report = nf4_load.load_nf4(
        tiny,
        first.files,
        T.AutoConfig.from_pretrained(tiny),
        first.hash,
        {"dtype": torch.float32},
        lambda: pytest.fail("was to be streamed"),
        skip=("down_proj",),
    )
    assert len(report) == 24
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is nn.Linear


def test_without_a_place_for_the_cache_all_is_kept_in_memory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = load_base(str(tiny), quantization="nf4")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "file"))
    again = load_base(str(tiny), quantization="nf4")
    assert "in memory, not in the cache" in capsys.readouterr().err
    assert same(state(again.model), state(first.model))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, cache: Path) -> None:
    model = random_model(MODELS["llama"]())
    model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(BaseError, match=r"layers\.1\.mlp\.up_proj"):
        load_base(str(tmp_path / "model"), quantization="nf4")
    assert not list(cache.glob("*"))


@pytest.mark.slow
def test_lora_trains_on_it_and_switched_off_leaves_it_as_it_was(tiny: Path) -> None:
    base = load_base(str(tiny), quantization="nf4")
    run = flat_run((12, 20, 9))
    before, weights = logits(base, run), state(base.model)
    adapter = put(base, "a", rank=4)
    assert torch.equal(logits(base, run), before)
    assert not torch.equal(logits(base, run, Segments.on_all_tokens("a")), before)
    tokens, positions, bounds = run
    labels = tokens.roll(-1)
    optimizer, losses = torch.optim.AdamW(adapter.parameters(), lr=1e-2), []
    for _ in range(30):
        with base.forward_context.use(Segments.on_all_tokens("a")):
            loss = base.loss(tokens, positions, bounds, labels) / len(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(logits(base, run), before)
    assert all(
        torch.equal(weights[name], tensor)
        for name, tensor in _frozen(base.model.state_dict()).items()
    )


def _frozen(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base's tensors by the names that they have without adapters."""
    return {name.replace(".base.", "."): t for name, t in tensors.items() if ".deltas." not in name}


MEASURE = """
import sys
import afina.merging.merge_into_base, torch
from afina.models.loading import load_base
def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
base = load_base(sys.argv[1], dtype="bfloat16", quantization=sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_loading_is_far_below_the_model_in_16_bits(tmp_path: Path) -> None:
    config = T.LlamaConfig(
        vocab_size=320,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
    )
    model = random_model(config).to(torch.bfloat16)
    megabytes = sum(p.nbytes for p in model.parameters()) / 2**20
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    del model

    def peak(storage: str) -> float:
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), storage]
        environment = {**ENVIRONMENT, "AFINA_CACHE": str(tmp_path / "cache")}
        return float(
            subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            ).stdout
        )

    ordinary, quantising, cached = peak("none"), peak("nf4"), peak("nf4")
    print(
        f"peak over the imports, MB: plain {ordinary:.0f}, quantising {quantising:.0f}, from the cache {cached:.0f}"
    )
    assert ordinary > megabytes
    assert max(quantising, cached) < 0.75 * megabytes


# ---- moments in 8 bits


def regression(optimizer: Callable[..., torch.optim.Optimizer], seed: int) -> float:
    """Loss on unseen points after 300 steps of learning a random small network, the rate falling to zero."""
    torch.manual_seed(seed)
    teacher, student = (
        nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 16)) for width in (64, 256)
    )
    x = torch.randn(2048, 32) * torch.logspace(-2, 0.5, 32)
    with torch.no_grad():
        y = teacher(x)
    steps = optimizer(student.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(300):
        steps.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
        rows = torch.randint(0, 1024, (128,))
        (student(x[rows]) - y[rows]).square().mean().backward()
        steps.step()
        steps.zero_grad()
    with torch.no_grad():
        return float((student(x[1024:]) - y[1024:]).square().mean())


@pytest.mark.slow
def test_8bit_moments_learn_as_well_as_float32_ones() -> None:
    ours, theirs = (
        sum(regression(kind, seed) for seed in range(3)) for kind in (AdamW8bit, torch.optim.AdamW)
    )
    assert ours < 1.05 * theirs


def test_8bit_moments_take_two_bytes_a_parameter() -> None:
    parameter = nn.Parameter(torch.randn(512, 512))
    optimizer = AdamW8bit([parameter])
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = sum(t.nbytes for t in optimizer.state[parameter].values()) / parameter.numel()
    assert held < 2.04
    small = nn.Parameter(torch.randn(8, 8))
    exact = [AdamW8bit([small]), torch.optim.AdamW([copy.deepcopy(small)])]
    for step in range(5):
        for each in exact:
            each.param_groups[0]["params"][0].grad = torch.full((8, 8), float(step) - 1.5)
            each.step()
    torch.testing.assert_close(*(each.param_groups[0]["params"][0] for each in exact))


def test_8bit_moments_are_saved_offloaded_and_never_leap() -> None:
    def start(**options: Any) -> tuple[nn.Parameter, AdamW8bit]:
        parameter = nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128).to(torch.bfloat16))
        return parameter, AdamW8bit([parameter], lr=1e-2, **options)

    def go(parameter: nn.Parameter, optimizer: AdamW8bit, steps: range) -> None:
        for step in steps:
            parameter.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step)).to(
                torch.bfloat16
            )
            optimizer.step()

    whole, there, resumed = start(), start(offload=True), start()
    go(*whole, range(10))
    go(*there, range(10))
    assert torch.equal(whole[0], there[0])
    first = start()
    go(*first, range(5))
    resumed[0].data.copy_(first[0].data)
    resumed[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    assert resumed[1].state[resumed[0]]["first"].dtype == torch.uint8
    go(*resumed, range(5, 10))
    assert torch.equal(whole[0], resumed[0])

    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = AdamW8bit([parameter], lr=1e-3, weight_decay=0.0)
    for step in range(20):  # one number's gradient is large; the others' were tiny once
        parameter.grad = torch.full_like(parameter, 1e-4 if step == 0 else 0.0)
        parameter.grad[::256] = 1.0
        optimizer.step()
    assert parameter.abs().max() < 0.05

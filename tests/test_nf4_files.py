"""Whole models in NF4 on disk: merged out of four bits, into them again, and as bitsandbytes reads them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import afina
from afina.adapters.loading import load_adapter
from afina.adapters.saving import save_adapter
from afina.adapters.segments import Segments
from afina.errors import BaseError, MergeError
from afina.models.loading import load_base
from afina.models.nf4 import NF4Linear
from helpers import flat_run, logits, put, save_model

LENGTHS = (12,)


@pytest.fixture(scope="module", params=["tied", "untied"])
def wide(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A Llama whose widths 64 divides."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=request.param == "tied",
        attention_bias=True,
    )
    return save_model(tmp_path_factory.mktemp("wide"), config, tokenizer)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_merged_out_of_four_bits_is_what_the_adapter_was_trained_on(
    wide: Path, tmp_path: Path
) -> None:
    base = load_base(str(wide), quantization="nf4")
    save_adapter(put(base), base, tmp_path / "adapter")
    on = logits(base, flat_run(LENGTHS), Segments.on_all_tokens("a"))
    proof = afina.merge(tmp_path / "adapter", output_dir=tmp_path / "merged")
    assert proof["quantization"] == "none"
    assert proof["kl"] < 1e-7
    merged = load_base(str(tmp_path / "merged"))
    assert not any(isinstance(module, NF4Linear) for module in merged.model.modules())
    torch.testing.assert_close(logits(merged, flat_run(LENGTHS)), on, rtol=1e-4, atol=1e-4)
    plain = load_base(str(wide))  # which is another model than the one in four bits
    load_adapter(tmp_path / "adapter", plain, "a")
    assert (logits(plain, flat_run(LENGTHS), Segments.on_all_tokens("a")) - on).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("held", ["none", "nf4"])
def test_merged_into_four_bits_is_written_and_measured(
    wide: Path, held: str, tmp_path: Path
) -> None:
    base = load_base(str(wide), quantization=held)  # type: ignore[arg-type]
    save_adapter(put(base), base, tmp_path / "adapter")
    with pytest.raises(MergeError, match="differs from the adapted one") as caught:
        afina.merge(
            tmp_path / "adapter", output_dir=tmp_path / "merged", quantization="nf4", max_kl=1e-6
        )
    assert "loss" in str(caught.value)
    assert not (tmp_path / "merged").exists()
    proof = afina.merge(
        tmp_path / "adapter", output_dir=tmp_path / "merged", quantization="nf4", max_kl=10.0
    )
    assert 1e-6 < proof["kl"] < 10.0
    assert proof["loss_merged"] != proof["loss_adapted"]
    ours = load_base(str(tmp_path / "merged"))
    assert ours.quantization == "nf4"
    assert sum(isinstance(module, NF4Linear) for module in ours.model.modules()) == 14
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size < 0.75 * (
        wide / "model.safetensors"
    ).stat().st_size
    run = flat_run(LENGTHS)

    pytest.importorskip("bitsandbytes")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", device_map="cpu", attn_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs(input_ids=run[0][None]).logits[0]
    assert (
        logits(ours, run) - expected
    ).norm() < 0.03 * expected.norm()  # theirs multiplies in bfloat16 on some CPUs
    adapter = put(ours, "b")  # and it is a base like any other
    save_adapter(adapter, ours, tmp_path / "next")
    assert logits(ours, run, Segments.on_all_tokens("b")).isfinite().all()


@pytest.mark.usefixtures("cached")
def test_bitsandbytes_own_files_are_read(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    how = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    for double in (True, False):
        config = BitsAndBytesConfig(**how, bnb_4bit_use_double_quant=double)
        theirs = AutoModelForCausalLM.from_pretrained(
            wide, quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        folder = tmp_path / str(double)
        theirs.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((wide / name).read_bytes())
        if not double:
            with pytest.raises(BaseError, match="codes of this module cannot be read") as caught:
                load_base(str(folder))
            assert "double quantization" in str(caught.value)
            continue
        run = flat_run(LENGTHS)
        with torch.no_grad():
            expected = theirs(input_ids=run[0][None]).logits[0]
        base = load_base(str(folder))
        assert (logits(base, run) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.slow
def test_what_cannot_be_written_or_read_is_refused(tiny: Path, wide: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny))
    save_adapter(put(base), base, tmp_path / "adapter")
    with pytest.raises(MergeError, match="cannot represent this module") as caught:
        afina.merge(tmp_path / "adapter", output_dir=tmp_path / "merged", quantization="nf4")
    assert "width 48" in str(caught.value)
    assert not (tmp_path / "merged").exists()

    other = tmp_path / "other"
    other.mkdir()
    for file in wide.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(BaseError, match="is not supported"):
        load_base(str(other))

    wide_base = load_base(str(wide))
    save_adapter(put(wide_base), wide_base, tmp_path / "b")
    afina.merge(tmp_path / "b", output_dir=tmp_path / "four", quantization="nf4", max_kl=10.0)
    weights = tmp_path / "four" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(BaseError, match="do not fit"):
        load_base(str(tmp_path / "four"))

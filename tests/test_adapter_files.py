"""Adapters on disk: PEFT reads ours and we read PEFT's; what does not fit is refused; an adapter is its content."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

import afina
from afina.adapters.loading import load_adapter
from afina.adapters.saving import save_adapter
from afina.adapters.segments import Segments
from afina.errors import AdapterError
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from helpers import flat_run, logits, put, same, save_model, state

peft = pytest.importorskip("peft")
WEIGHTS, CONFIG, STORY = "adapter_model.safetensors", "adapter_config.json", "afina.json"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    config = GPT2Config(
        vocab_size=320,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return save_model(tmp_path_factory.mktemp("gpt2"), config, tokenizer)


def plain(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def theirs(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=flat_run((40,))[0][None]).logits[0]


def ours(base: CausalLM, adapter: str) -> Tensor:
    return logits(base, flat_run((40,)), Segments.on_all_tokens(adapter))


OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("tiny", {"rank": 4, "alpha": 12.0, "dropout": 0.1}),
    "rslora": ("tiny", {"rank": 16, "alpha": 4.0, "scaling": "rslora"}),
    "patterns": (
        "tiny",
        {
            "rank_pattern": {
                "model.layers.1.mlp.down_proj": 3,
                "model.layers.0.self_attn.q_proj": 20,
            },
            "alpha_pattern": {"model.layers.1.mlp.down_proj": 40.0},
        },
    ),
    "some-layers": ("tiny", {"layers": [1, 3]}),
    "some-names": ("tiny", {"target_modules": ["q_proj", "up_proj"], "layers": "last:2"}),
    "output-layer": ("tiny", {"target_modules": ["v_proj", "lm_head"]}),
    "tied-output-layer": ("tied", {"target_modules": ["lm_head"]}),
    "gpt2": ("gpt2", {}),
    "gpt2-attention": ("gpt2", {"target_modules": r".*\.attn\.c_proj", "layers": [1]}),
    "gpt2-mixed": ("gpt2", {"target_modules": ["c_attn", "lm_head"]}),
}


@pytest.mark.parametrize("case", OURS)
def test_peft_loads_ours(
    request: pytest.FixtureRequest, tmp_path: Path, case: str, recwarn: Any
) -> None:
    kind, spec = OURS[case]
    folder = request.getfixturevalue(kind)
    base = load_base(str(folder))
    save_adapter(put(base, **spec), base, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(plain(folder), tmp_path / "adapter")
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]
    expected = ours(base, "a")
    assert (expected - theirs(plain(folder))).abs().max() > 0.01
    assert (theirs(loaded) - expected).abs().max() < 2e-5  # float32, summed in another order


THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("tiny", {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}),
    "rslora": (
        "tiny",
        {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    ),
    "patterns": (
        "tiny",
        {
            "r": 8,
            "target_modules": "all-linear",
            "rank_pattern": {"down_proj": 3, r"layers\.[01]\.self_attn\.q_proj": 5, "q_proj": 2},
            "alpha_pattern": {r"^model\.layers\.3\..*": 50, "down_proj": 2},
        },
    ),
    "some-layers": (
        "tiny",
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 3]},
    ),
    "expression": ("tiny", {"target_modules": r".*layers\.(0|2)\.mlp\.(up|down)_proj"}),
    "output-layer": ("tiny", {"target_modules": ["v_proj", "lm_head"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


def random_peft(folder: Path, **config: Any) -> Any:
    """A LoRA of PEFT whose numbers are random, and small enough for the logits to stay of the order of one."""
    model = peft.get_peft_model(
        plain(folder), peft.LoraConfig(task_type="CAUSAL_LM", **config)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.05)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("case", THEIRS)
def test_we_load_pefts(request: pytest.FixtureRequest, tmp_path: Path, case: str) -> None:
    kind, config = THEIRS[case]
    folder = request.getfixturevalue(kind)
    model = random_peft(folder, **config)
    model.save_pretrained(tmp_path / "adapter")
    base = load_base(str(folder))
    load_adapter(tmp_path / "adapter", base, "p")
    expected = theirs(model)
    assert (expected - theirs(plain(folder))).abs().max() > 0.01
    assert (ours(base, "p") - expected).abs().max() < 1e-5


@pytest.mark.slow
def test_pefts_adapter_comes_back_the_same(tiny: Path, tmp_path: Path) -> None:
    """PEFT's, saved by us, read by PEFT again."""
    model = random_peft(tiny, r=3, lora_alpha=5, target_modules="all-linear")
    model.save_pretrained(tmp_path / "first")
    base = load_base(str(tiny))
    save_adapter(load_adapter(tmp_path / "first", base), base, tmp_path / "second")
    assert sorted(load_file(tmp_path / "first" / WEIGHTS)) == sorted(
        load_file(tmp_path / "second" / WEIGHTS)
    )
    again = peft.PeftModel.from_pretrained(plain(tiny), tmp_path / "second")
    assert torch.equal(theirs(again.eval()), theirs(model))


def test_a_frozen_weight_that_peft_brings_along_must_be_the_bases(
    tiny: Path, tmp_path: Path
) -> None:
    random_peft(tiny, target_modules=["lm_head"]).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert "base_model.model.lm_head.base_layer.weight" in tensors
    tensors["base_model.model.lm_head.base_layer.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    assert "lm_head.base_layer.weight is not the base's weight" in str(
        refused(tiny, tmp_path / "adapter")
    )


# refused


@pytest.fixture
def saved(base: CausalLM, tmp_path: Path) -> Path:
    save_adapter(put(base, layers=[0, 1]), base, tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, file: str, **values: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **values}))


def refused(tiny: Path, folder: Path) -> AdapterError:
    """The error with which the adapter is refused; the model stays as it was."""
    base = load_base(str(tiny))
    before, modules = state(base.model), list(base.model.modules())
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, base)
    assert same(base.model.state_dict(), before)
    assert all(a is b for a, b in zip(base.model.modules(), modules, strict=True))
    return caught.value


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.slow
@pytest.mark.parametrize("ours_too", [True, False], ids=["afina", "peft"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"missing: 1 tensor, the first: .*down_proj.lora_A"),
        ("unknown", r"without a module: 1 tensor, the first: .*layers.3.mlp.up_proj.extra"),
        ("shape", r"down_proj.lora_A.weight has the wrong shape"),
        ("no-layer", r"the base has no such module"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tiny: Path, saved: Path, ours_too: bool, fault: str, message: str
) -> None:
    tensors = load_file(saved / WEIGHTS)
    if not ours_too:
        (saved / STORY).unlink()
    if fault == "missing":
        twin = FIRST.replace("lora_A", "lora_B")
        del tensors[
            FIRST if ours_too else twin
        ]  # PEFT's configuration names no layers: those with an A are meant
        message = message if ours_too else message.replace("lora_A", "lora_B")
    elif fault == "unknown":
        tensors["base_model.model.model.layers.3.mlp.up_proj.extra"] = torch.zeros(2)
    elif fault == "shape":
        tensors[FIRST] = tensors[FIRST][:, :-1].contiguous()
    else:
        tensors = {name.replace("layers.1", "layers.9"): tensor for name, tensor in tensors.items()}
        if ours_too:
            spec = json.loads((saved / STORY).read_text())["spec"]
            change(
                saved,
                STORY,
                spec={
                    **spec,
                    "targets": [path.replace("layers.1", "layers.9") for path in spec["targets"]],
                },
            )
    save_file(tensors, saved / WEIGHTS)
    error = refused(tiny, saved)
    assert error.where
    assert re.search(message, str(error))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not a supported adapter type"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_what_peft_can_and_we_cannot_is_refused(
    tiny: Path, saved: Path, values: dict[str, Any], message: str
) -> None:
    (saved / STORY).unlink()
    change(saved, CONFIG, **values)
    assert message in str(refused(tiny, saved))


@pytest.mark.slow
def test_initialisations_that_leave_the_base_alone_are_read(tiny: Path, saved: Path) -> None:
    (saved / STORY).unlink()
    for value in (True, False, "gaussian", "orthogonal"):
        change(saved, CONFIG, init_lora_weights=value)
        load_adapter(saved, load_base(str(tiny)))


@pytest.mark.slow
def test_another_base_is_refused_by_its_hash(
    saved: Path, tmp_path: Path, tiny: Path, tokenizer: Any
) -> None:
    config = load_base(str(tiny)).model.config
    other = load_base(str(save_model(tmp_path / "other", config, tokenizer, seed=7)))
    with pytest.raises(AdapterError, match="trained on another base") as caught:
        load_adapter(saved, other)
    assert "--allow-other-base" in str(caught.value)
    load_adapter(saved, other, allow_other_base=True)
    renamed = shutil.copytree(
        tiny, tmp_path / "renamed"
    )  # the same tensors elsewhere are the same base
    load_adapter(saved, load_base(str(renamed)))


def test_a_newer_format_is_refused_and_an_older_one_read(tiny: Path, saved: Path) -> None:
    change(saved, STORY, format_version=99)
    error = refused(tiny, saved)
    assert "written by a newer afina" in str(error)
    assert error.hint == "pip install -U afina"
    change(saved, STORY, format_version=0)
    load_adapter(saved, load_base(str(tiny)))


@pytest.mark.parametrize("size", [4, 300, -8])
def test_a_truncated_file_is_refused(tiny: Path, saved: Path, size: int) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:size])
    error = refused(tiny, saved)
    assert WEIGHTS in (error.where or "")
    assert error.hint == "copy the adapter again"


@pytest.mark.parametrize("file", [CONFIG, STORY])
def test_damaged_json_is_refused(tiny: Path, saved: Path, file: str) -> None:
    if file == CONFIG:
        (saved / STORY).unlink()
    (saved / file).write_text('{"r": 8, ')
    assert file in (refused(tiny, saved).where or "")
    (saved / file).write_text("[]")
    assert "not a JSON object" in str(refused(tiny, saved))


def test_pickled_and_missing_weights_are_refused(tiny: Path, saved: Path, tmp_path: Path) -> None:
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    assert "load it in PEFT and save it again" in str(refused(tiny, saved))
    (saved / "adapter_model.bin").unlink()
    assert "no adapter_model.safetensors" in str(refused(tiny, saved))
    assert "no adapter here" in str(refused(tiny, tmp_path / "nowhere"))


# an adapter is its content


def test_the_hash_is_that_of_the_content(base: CausalLM, tiny: Path, tmp_path: Path) -> None:
    adapter = put(base)
    digest = save_adapter(adapter, base, tmp_path / "one")
    other = load_base(str(tiny))
    assert (
        save_adapter(put(other, "another-name"), other, tmp_path / "two", {"note": "x"}) == digest
    )
    assert (
        save_adapter(load_adapter(tmp_path / "one", other, "b"), other, tmp_path / "three")
        == digest
    )
    with torch.no_grad():
        adapter.parameters()[3].flatten()[0] += 1e-3
    changed = save_adapter(adapter, base, tmp_path / "four")
    stronger = load_base(str(tiny))
    assert (
        len({digest, changed, save_adapter(put(stronger, alpha=17.0), stronger, tmp_path / "five")})
        == 3
    )
    for folder, expected in (("one", digest), ("four", changed)):
        assert json.loads((tmp_path / folder / STORY).read_text())["hash"] == expected


def test_the_hash_of_a_base_is_that_of_its_tensors(
    tiny: Path, tmp_path: Path, tokenizer: Any
) -> None:
    base = load_base(str(tiny))
    base.model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert load_base(str(tmp_path / "shards")).hash == base.hash != ""
    assert load_base(str(tiny), dtype="bfloat16").hash == base.hash
    other = save_model(tmp_path / "other", base.model.config, tokenizer, seed=7)
    assert load_base(str(other)).hash != base.hash


def test_saving_replaces_the_adapter_that_was_there(base: CausalLM, tmp_path: Path) -> None:
    save_adapter(put(base), base, tmp_path / "a")
    digest = save_adapter(put(base, "b", seed=2, rank=2), base, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert json.loads((tmp_path / "a" / STORY).read_text())["hash"] == digest
    assert load_file(tmp_path / "a" / WEIGHTS)[FIRST].shape[0] == 2


def test_public_function(tiny: Path, saved: Path) -> None:
    assert afina.load_adapter(saved, afina.load_base(str(tiny)), "x").name == "x"

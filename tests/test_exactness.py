"""Exact is the default: packed, chunked, accumulated, resumed, cached, merged, saved, attached, switched off."""

import json
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import afina
from afina.adapters.attach import detach
from afina.adapters.loading import load_adapter
from afina.adapters.registry import registered_methods
from afina.adapters.saving import save_adapter, tensors_of
from afina.adapters.segments import Segment, Segments
from afina.data.renderer import Example
from afina.engine.request import SamplingParams
from afina.kernels import cross_entropy
from afina.kernels.cross_entropy import linear_cross_entropy
from afina.merging.merge_into_base import merge_into_base
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.objectives.language_modeling import LanguageModelingObjective
from afina.training.trainer import Trainer
from helpers import (
    ENVIRONMENT,
    flat_run,
    generate_tokens,
    logits,
    metrics,
    one_by_one,
    put,
    same,
    state,
)
from reference_decoder import reference_tokens

LENGTHS = (9, 1, 14, 6, 33)


def labels_for(tokens: Tensor, seed: int = 0) -> Tensor:
    """The tokens as labels, about half of them masked."""
    masked = torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed)) < 0.5
    return tokens.roll(-1).masked_fill(masked, -100)


def gradients(
    base: CausalLM, parameters: list[torch.nn.Parameter], *losses: Tensor
) -> list[Tensor]:
    return list(torch.autograd.grad(sum(losses), parameters))


# packed = one by one


@pytest.mark.parametrize("method", ["lora", "full"])
def test_packed_is_one_by_one(base: CausalLM, method: str) -> None:
    adapter = put(base, target_modules="all-linear" if method == "lora" else "all", method=method)
    on, run = Segments.on_all_tokens("a"), flat_run(LENGTHS)
    alone = torch.cat([logits(base, part, on) for part in one_by_one(run)])
    assert (logits(base, run, on) - alone).abs().max() < 1e-5
    labels = labels_for(run[0])
    with base.forward_context.use(on):
        packed = gradients(base, adapter.parameters(), base.loss(*run, labels))
        pieces = labels.tensor_split(run[2][1:-1])
        single = gradients(
            base,
            adapter.parameters(),
            *(base.loss(*p, t) for p, t in zip(one_by_one(run), pieces, strict=True)),
        )
    for name, a, b in zip([n for n, _ in adapter.named_parameters()], packed, single, strict=True):
        assert a.abs().max() > 1e-3, name
        assert (a - b).norm() / b.norm() < 1e-5, name


def test_attention_does_not_cross_and_does_not_look_ahead(base: CausalLM) -> None:
    tokens, positions, bounds = run = flat_run(LENGTHS)
    changed = tokens.clone()
    changed[bounds[2] + 3] = 7  # the fourth token of the third sequence
    difference = (logits(base, run) - logits(base, (changed, positions, bounds))).abs().amax(-1)
    touched = difference.nonzero()[:, 0].tolist()
    assert touched == list(range(bounds[2] + 3, bounds[3]))


def test_the_fast_blocks_are_transformers_own(base: CausalLM, tiny: Path) -> None:
    """Logits and the gradients of all weights, against the model as transformers runs it."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager").eval()
    tokens, positions, bounds = run = flat_run((40,))
    theirs = plain(input_ids=tokens[None]).logits[0]
    assert (logits(base, run) - theirs).abs().max() < 1e-5
    adapter = put(base, target_modules="all", method="full")
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(plain.get_parameter(name))
    F.cross_entropy(theirs[:-1], tokens[1:], reduction="sum").backward()
    with base.forward_context.use(Segments.on_all_tokens("a")):
        base.loss(
            tokens, positions, bounds, torch.cat([tokens[1:], torch.tensor([-100])])
        ).backward()
    for name, parameter in adapter.named_parameters():
        expected = plain.get_parameter(name).grad
        assert (parameter.grad - expected).norm() / expected.norm() < 1e-5, name


# chunked and masked loss = plain cross-entropy


@pytest.mark.parametrize("rows", [1, 16, 17, 50])
@pytest.mark.parametrize(
    ("bias", "softcap"), [(False, None), (True, None), (False, 2.0), (True, 2.0)]
)
def test_chunked_loss_is_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, rows: int, bias: bool, softcap: float | None
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1)  # chunks of 16 rows, the least
    hidden, weight = torch.randn(rows, 24), torch.randn(101, 24) / 3
    labels = torch.randint(0, 101, (rows,))
    ours = [
        t.clone().requires_grad_() for t in (hidden, weight, *([torch.randn(101)] if bias else []))
    ]
    plain = [t.detach().double().requires_grad_() for t in ours]
    z = F.linear(plain[0], plain[1], plain[2] if bias else None)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    each = F.cross_entropy(z, labels, reduction="none")
    losses = linear_cross_entropy(ours[0], ours[1], ours[2] if bias else None, labels, softcap)
    torch.testing.assert_close(losses.double(), each, rtol=1e-6, atol=1e-6)
    loss, expected = losses.sum(), each.sum()
    assert abs(loss.item() / expected.item() - 1) < 1e-6
    (0.5 * loss).backward()
    (0.5 * expected).backward()
    for a, b in zip(ours, plain, strict=True):
        assert (a.grad.double() - b.grad).norm() / b.grad.norm() < 1e-6


def test_rows_of_the_chunked_loss_may_count_differently() -> None:
    hidden, weight, labels = (
        torch.randn(9, 24),
        torch.randn(101, 24) / 3,
        torch.randint(0, 101, (9,)),
    )
    counts = torch.tensor([1.0, 1, 1, 2, 2, 2, 0, 0.5, 0.5])
    ours, plain = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    (linear_cross_entropy(ours, weight, None, labels) * counts).sum().backward()
    (
        F.cross_entropy(plain @ weight.T.double(), labels, reduction="none") * counts.double()
    ).sum().backward()
    assert (ours.grad.double() - plain.grad).norm() / plain.grad.norm() < 1e-6
    trained = weight.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="summed or averaged"):
        (linear_cross_entropy(ours, trained, None, labels) * counts).sum().backward()


def test_masked_positions_do_not_reach_the_output_layer(
    base: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = linear_cross_entropy

    def watched(hidden: Tensor, *others: Any) -> Tensor:
        seen.append(len(hidden))
        return real(hidden, *others)

    monkeypatch.setattr("afina.models.causal_lm.linear_cross_entropy", watched)
    run = flat_run(LENGTHS)
    labels = labels_for(run[0])
    kept = labels >= 0
    loss = base.loss(*run, labels)
    assert seen == [int(kept.sum())]
    assert (
        abs(
            loss.item()
            / F.cross_entropy(logits(base, run)[kept], labels[kept], reduction="sum").item()
            - 1
        )
        < 1e-6
    )


def test_loss_through_an_adapted_output_layer(base: CausalLM) -> None:
    adapter = put(base, target_modules="lm_head")
    run = flat_run(LENGTHS)
    labels = labels_for(run[0])
    kept = labels >= 0
    with base.forward_context.use(Segments.on_all_tokens("a")):
        loss, whole = base.loss(*run, labels), base.all_logits(*run)
        expected = F.cross_entropy(whole[kept], labels[kept], reduction="sum")
        assert abs(loss.item() / expected.item() - 1) < 1e-6
        for a, b in zip(
            gradients(base, adapter.parameters(), loss),
            gradients(base, adapter.parameters(), expected),
            strict=True,
        ):
            assert (a - b).norm() / b.norm() < 1e-5


def test_loss_through_an_output_layer_adapted_on_some_tokens(base: CausalLM) -> None:
    put(base, target_modules=["lm_head", "q_proj"])
    run = flat_run(LENGTHS)
    labels = labels_for(run[0])
    kept = labels >= 0
    route = Segments(spans=(Segment(3, 8, "a"), Segment(12, run[2][-1], "a", 0.5)))
    with base.forward_context.use(route), torch.no_grad():
        whole = base.all_logits(*run)
        expected = F.cross_entropy(whole[kept], labels[kept], reduction="none")
        torch.testing.assert_close(base.token_losses(*run, labels), expected, rtol=1e-5, atol=1e-6)
        last = [end - 1 for end in run[2][1:]]
        torch.testing.assert_close(base.next_token_logits(*run), whole[last], rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "dora", "mora", "full"])
def test_logits_of_a_16_bit_base_are_summed_in_float32(tiny: Path, method: str) -> None:
    """Of the base beside an adapter of the output layer, and of the adapter, on all tokens or some."""
    base = load_base(str(tiny), dtype="bfloat16")
    layer: Any = put(base, method=method, target_modules=["lm_head"]).layers["lm_head"]
    hidden = torch.randn(5, base.hidden_size or 0).bfloat16()
    weight = layer.layer.weight.float()
    plain, adapted = (
        hidden.double() @ matrix.double().T for matrix in (weight, layer.merged_weight(weight))
    )
    torch.testing.assert_close(base.logits(hidden).double(), plain, rtol=1e-5, atol=1e-5)
    with base.forward_context.use(Segments.on_all_tokens("a")):
        torch.testing.assert_close(base.logits(hidden).double(), adapted, rtol=1e-4, atol=1e-4)
    with base.forward_context.use(Segments(spans=(Segment(1, 3, "a"),))):
        found, expected = base.logits(hidden).double(), plain.clone()
        expected[1:3] = adapted[1:3]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# accumulated = one batch


def one_run(
    tiny: Path, tmp_path: Path, batch_tokens: int, accumulate: int, **settings: Any
) -> tuple[dict[str, Tensor], list[Any]]:
    """Four steps on examples of equal length, whose labels are very unevenly spread: the adapter and the ticks."""
    base = load_base(str(tiny))
    adapter = put(base)
    examples = []
    for i in range(8):
        tokens = flat_run((16,), seed=i)[0].tolist()
        prompt = 15 if i % 2 else 1
        examples.append(Example(f"x:{i}", tokens, [n >= prompt for n in range(16)], prompt, None))
    task = LanguageModelingObjective(base, examples, examples[:1], batch_tokens, accumulate, seed=3)
    made = SimpleNamespace(
        prepared=SimpleNamespace(base=base, task=task),
        adapter=adapter,
        learning_rate=1e-4,
        rates={},
        steps=4,
        check_every=99,
        restart_every=0,
        settings=SimpleNamespace(
            weight_decay=0.0,
            optimizer="adamw",
            early_stopping_patience=None,
            lr_scheduler_type="constant",
            warmup_ratio=0.0,
            max_grad_norm=1.0,
            recomputed=0,
            seed=3,
            **settings,
        ),
    )
    ticks: list[Any] = []
    Trainer(made, tmp_path, {}, ticks.append, lambda step: None).train()  # type: ignore[arg-type]
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}, ticks


@pytest.mark.slow
def test_accumulated_is_one_batch(tiny: Path, tmp_path: Path) -> None:
    """Four micro-batches of one row with 15 labels or one: a mean of means would be far off."""
    whole, ticks = one_run(tiny, tmp_path, 64, 1)
    parts, other = one_run(tiny, tmp_path, 16, 4)
    assert [tick.tokens for tick in ticks] == [tick.tokens for tick in other] == [64] * 4
    for a, b in zip(ticks, other, strict=True):
        assert abs(a.loss - b.loss) < 1e-6 * a.loss
        assert abs(a.grad_norm - b.grad_norm) < 1e-5 * a.grad_norm
    for name in whole:
        assert (whole[name] - parts[name]).abs().max() < 1e-6, name


# resumed = uninterrupted


class Killed(BaseException):
    """Stands for kill -9 within one process: nothing catches it."""


def dying(step: int) -> type:
    """A display that dies at `step`."""
    from afina.training.progress import NullProgress

    class Dying(NullProgress):
        def tick(self, tick: Any, run: int = 0) -> None:
            if tick.step == step:
                raise Killed

    return Dying


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        ("lora", "adamw"),
        ("full", "adamw"),
        ("full", "adamw_8bit"),
        ("full", "adamw_8bit_offload"),
        ("lora", "adamw_8bit"),
    ],
)
def test_resumed_is_uninterrupted_bit_for_bit(
    tiny: Path,
    chats: Path,
    general: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    optimizer: str,
) -> None:
    settings: dict[str, Any] = dict(
        base=str(tiny),
        max_steps=12,
        eval_steps=6,
        max_tokens_per_batch=256,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        retention_text=general,
        method=method,
        dropout=0.1 if method == "lora" else 0.0,
        weight_decay=0.01,
        seed=4,
        gradient_checkpointing=True,
        optimizer=optimizer,
    )
    whole = afina.train(chats, output_dir=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr("afina.training.train.NullProgress", dying(9))
        with pytest.raises(Killed):
            afina.train(chats, output_dir=tmp_path / "cut", **settings)
    assert [line["step"] for line in metrics(tmp_path / "cut")] == list(range(1, 10))
    torch.manual_seed(99)  # whatever this process has drawn since
    cut = afina.train(chats, output_dir=tmp_path / "cut", resume=True, **settings)
    for file in ("adapter/adapter_model.safetensors", "checkpoint/state.safetensors"):
        assert same(load_file(whole.folder / file), load_file(cut.folder / file)), file
    assert metrics(whole.folder) == metrics(cut.folder)
    assert whole.record["losses"] == cut.record["losses"]
    assert whole.record["adapter"] == cut.record["adapter"]


@pytest.mark.slow
def test_kill_9_and_resume(tiny: Path, chats: Path, general: Path, tmp_path: Path) -> None:
    settings = dict(
        base=str(tiny),
        retention_text=str(general),
        max_steps=200,
        eval_steps=4,
        max_tokens_per_batch=512,
        learning_rate=1e-3,
        dropout=0.1,
    )
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "afina", "train", chats, *flags, "--output-dir"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, tmp_path / "cut"], env=ENVIRONMENT, **silent)
    log = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (log.exists() and log.read_text().count("\n") > 40):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = json.loads((tmp_path / "cut" / "checkpoint" / "progress.json").read_text())["progress"][
        "step"
    ]
    assert log.read_text().count("\n") - done <= 4 + 1, (
        "more was lost than the steps since the last checkpoint"
    )
    # each in a process of its own, as the killed one was
    runs = [[*command, tmp_path / "cut", "--resume"], [*command, tmp_path / "whole"]]
    ends = [subprocess.Popen(run, env=ENVIRONMENT, **silent) for run in runs]
    assert [end.wait() for end in ends] == [0, 0]
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    cut, whole = (
        json.loads((tmp_path / name / "run.json").read_text()) for name in ("cut", "whole")
    )
    assert cut["adapter"] == whole["adapter"]


# recomputed activations


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_on_is_off(base: CausalLM, dropout: float) -> None:
    adapter = put(base, dropout=dropout)
    adapter.train(True)
    modes = [module.training for module in base.model.modules()]
    run = flat_run(LENGTHS)
    labels = labels_for(run[0])
    results = []
    for on in (False, True):
        torch.manual_seed(5)
        with base.gradient_checkpointing(on), base.forward_context.use(Segments.on_all_tokens("a")):
            loss = base.loss(*run, labels)
        results.append(
            [loss, *gradients(base, adapter.parameters(), loss)]
        )  # the route is another one by now
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert [module.training for module in base.model.modules()] == modes


@pytest.mark.parametrize("activated", [False, True], ids=["everywhere", "activated"])
@pytest.mark.parametrize("method", registered_methods())
def test_the_dial_of_checkpointing_changes_no_number(
    base: CausalLM, method: str, activated: bool
) -> None:
    """Off, each n-th block, all: losses and gradients are equal, for each delta, also where it acts from a token on."""
    if activated and method == "full":
        pytest.skip("full acts everywhere")
    adapter = put(base, method=method)
    run = flat_run(LENGTHS)
    labels = labels_for(run[0])
    table = Segments.on_all_tokens("a")
    if activated:
        table = Segments(
            spans=tuple(
                Segment(end - (end - start + 1) // 2, end, "a", 1.0)
                for start, end in pairwise(run[2])
            )
        )
    adapter.train(True)
    inside = dict.fromkeys((0, 1, 2, 3), 0)

    def count(*_: Any) -> None:
        inside[every] += 1

    results = []
    handles = [
        m.register_forward_pre_hook(count)
        for name, m in base.model.named_modules()
        if name.endswith(".input_layernorm")
    ]
    for every in inside:
        with base.gradient_checkpointing(every), base.forward_context.use(table):
            loss = base.loss(*run, labels)
        results.append([loss, *gradients(base, adapter.parameters(), loss)])
    for handle in handles:
        handle.remove()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert any(g.abs().max() > 0 for g in results[0][1:])
    assert inside == {
        0: 4,
        1: 8,
        2: 6,
        3: 6,
    }  # of four blocks: all run twice, each second (0, 2), each third (0, 3)


def test_several_forwards_may_come_before_their_backward(base: CausalLM) -> None:
    """Two routes under checkpointing, as preference learning needs: each recomputes under its own table."""
    adapter = put(base)
    run = flat_run((20,))
    labels = labels_for(run[0])

    def losses(on: bool) -> list[Tensor]:
        with base.gradient_checkpointing(on):
            made = []
            for weight in (1.0, 0.25):
                with base.forward_context.use(Segments.on_all_tokens("a", weight)):
                    made.append(base.loss(*run, labels))
        return gradients(base, adapter.parameters(), made[0] - 3 * made[1])

    for a, b in zip(losses(False), losses(True), strict=True):
        assert torch.equal(a, b)


# merged = adapted


@pytest.mark.parametrize("kind", ["tiny", "tied"])
@pytest.mark.parametrize(
    ("method", "targets", "layers"),
    [
        ("lora", "all-linear", None),
        ("lora", ["q_proj", "lm_head"], None),
        ("full", "all", None),
        ("full", "lm_head", None),
        ("full", "embeddings", None),
        ("full", "all", "last:1"),
    ],
)
def test_merged_is_adapted(
    request: Any, tmp_path: Path, kind: str, method: str, targets: Any, layers: Any
) -> None:
    folder = request.getfixturevalue(kind)
    base = load_base(str(folder))
    adapter = put(base, target_modules=targets, method=method, layers=layers)
    run = flat_run(LENGTHS)
    expected, before = logits(base, run, Segments.on_all_tokens("a")), logits(base, run)
    assert (expected - before).abs().max() > 0.01
    merge_into_base(base, adapter)
    assert (logits(base, run) - expected).abs().max() < 1e-4
    base.model.save_pretrained(tmp_path / "merged")
    base.tokenizer.save_pretrained(tmp_path / "merged")
    again = load_base(str(tmp_path / "merged"))
    assert (logits(again, run) - expected).abs().max() < 1e-4
    still_tied = kind == "tied" and "lm_head" not in targets
    assert again.model.config.tie_word_embeddings is still_tied
    assert (again.lm_head.weight is again.model.get_input_embeddings().weight) is still_tied


@pytest.mark.slow
def test_merge_proves_itself_or_keeps_nothing(tiny: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny))
    save_adapter(put(base), base, tmp_path / "adapter")
    proof = afina.merge(tmp_path / "adapter", output_dir=tmp_path / "merged")
    assert proof["max_logit_difference"] < 1e-4
    assert proof["greedy_agreement"] == 1.0
    assert (
        json.loads((tmp_path / "merged" / "merge.json").read_text())["max_logit_difference"]
        == proof["max_logit_difference"]
    )
    with pytest.raises(afina.errors.MergeError, match="differs from the adapted one"):
        afina.merge(
            tmp_path / "adapter", output_dir=tmp_path / "refused", dtype="bfloat16", max_kl=1e-9
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


# saved = loaded


@pytest.mark.parametrize("kind", ["tiny", "tied"])
@pytest.mark.parametrize(
    ("method", "targets", "spec"),
    [
        ("lora", "all-linear", {"rank": 4, "alpha": 7.0, "scaling": "rslora", "dropout": 0.2}),
        (
            "lora",
            ["q_proj", "down_proj"],
            {"rank_pattern": {"model.layers.1.mlp.down_proj": 3}, "layers": [1, -1]},
        ),
        ("full", "all", {}),
        ("full", "norms", {"layers": "last:2"}),
    ],
)
def test_saved_is_loaded_bit_for_bit(
    request: Any, tmp_path: Path, kind: str, method: str, targets: Any, spec: Any
) -> None:
    folder = request.getfixturevalue(kind)
    base, run = load_base(str(folder)), flat_run(LENGTHS)
    adapter = put(base, target_modules=targets, method=method, **spec)
    digest = save_adapter(adapter, base, tmp_path / "adapter", {"note": "kept"})
    other = load_base(str(folder))
    again = load_adapter(tmp_path / "adapter", other, "b")
    assert again.config == adapter.config
    assert same(tensors_of(again), tensors_of(adapter))
    assert torch.equal(
        logits(base, run, Segments.on_all_tokens("a")),
        logits(other, run, Segments.on_all_tokens("b")),
    )
    about = json.loads((tmp_path / "adapter" / "afina.json").read_text())
    assert about["hash"] == digest
    assert about["base"]["hash"] == base.hash
    assert about["note"] == "kept"


# attached, switched off, detached


@pytest.mark.parametrize("kind", ["tiny", "tied"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_attach_and_detach_leave_the_model_as_it_was(request: Any, kind: str, method: str) -> None:
    base, run = load_base(str(request.getfixturevalue(kind))), flat_run(LENGTHS)
    before, keys, modules, values = (
        logits(base, run),
        list(base.model.state_dict()),
        list(base.model.named_modules()),
        state(base.model),
    )
    first = put(
        base, "a", target_modules="all-linear" if method == "lora" else "all", method=method
    )
    second = put(base, "b", target_modules=["q_proj", "o_proj"], seed=2)
    assert not torch.equal(logits(base, run, Segments.on_all_tokens("a")), before)
    assert torch.equal(logits(base, run), before)
    detach(base.model, first)
    detach(base.model, second)
    assert list(base.model.state_dict()) == keys
    assert same(base.model.state_dict(), values)
    after = list(base.model.named_modules())
    assert [path for path, _ in after] == [path for path, _ in modules]
    assert all(a is b for (_, a), (_, b) in zip(after, modules, strict=True))
    assert torch.equal(logits(base, run), before)
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.slow
def test_training_leaves_the_base_bit_for_bit(
    tiny: Path, chats: Path, general: Path, tmp_path: Path
) -> None:
    """After training, switched off: the base's logits; and its file is what it was."""
    base = load_base(str(tiny))
    before = logits(base, flat_run(LENGTHS))
    run = afina.train(
        chats,
        base=str(tiny),
        output_dir=tmp_path / "run",
        max_steps=3,
        method="full",
        learning_rate=1e-3,
        retention_text=general,
    )
    adapted = load_base(str(tiny))
    adapter = load_adapter(run.folder, adapted)
    assert torch.equal(logits(adapted, flat_run(LENGTHS)), before)
    assert not torch.equal(
        logits(adapted, flat_run(LENGTHS), Segments.on_all_tokens(adapter.name)), before
    )


def test_two_adapters_do_not_touch_each_other(base: CausalLM, tiny: Path) -> None:
    run = flat_run(LENGTHS)
    first, second = put(base, "a"), put(base, "b", seed=2, rank=3)
    alone = load_base(str(tiny))
    put(alone, "b", seed=2, rank=3)
    assert torch.equal(
        logits(base, run, Segments.on_all_tokens("b")),
        logits(alone, run, Segments.on_all_tokens("b")),
    )
    with base.forward_context.use(Segments.on_all_tokens("a")):
        base.loss(*run, labels_for(run[0])).backward()
    assert all(p.grad is not None for p in first.parameters())
    assert all(p.grad is None for p in second.parameters())
    before = logits(base, run, Segments.on_all_tokens("b"))
    detach(base.model, first)
    assert torch.equal(logits(base, run, Segments.on_all_tokens("b")), before)


# segments


def test_rows_over_everything_are_everywhere(base: CausalLM) -> None:
    run = flat_run(LENGTHS)
    put(base)
    rows = Segments(
        spans=tuple(Segment(a, b, "a") for a, b in zip(run[2], run[2][1:], strict=False))
    )
    assert (
        logits(base, run, rows) - logits(base, run, Segments.on_all_tokens("a"))
    ).abs().max() < 1e-5


def test_each_sequence_has_its_own_adapter_in_one_batch(base: CausalLM) -> None:
    """First by "a", second by nobody, third by "b" at half strength, fourth by both, fifth by "a" from its fourth token on."""
    run = flat_run((9, 5, 14, 6, 8))
    bounds = run[2]
    put(base, "a")
    put(base, "b", seed=2, rank=5, target_modules=["q_proj", "v_proj", "down_proj"])
    late = Segment(bounds[4] + 3, bounds[5], "a")
    table = Segments(
        spans=(
            Segment(bounds[0], bounds[1], "a"),
            Segment(bounds[2], bounds[3], "b", 0.5),
            Segment(bounds[3], bounds[4], "a"),
            Segment(bounds[3], bounds[4], "b", -2.0),
            late,
        )
    )
    alone = [
        Segments.on_all_tokens("a"),
        Segments(),
        Segments.on_all_tokens("b", 0.5),
        Segments(global_adapters=(("a", 1.0), ("b", -2.0))),
        Segments(spans=(Segment(3, 8, "a"),)),
    ]
    expected = torch.cat(
        [logits(base, part, one) for part, one in zip(one_by_one(run), alone, strict=True)]
    )
    assert (logits(base, run, table) - expected).abs().max() < 1e-5
    first = slice(bounds[4], bounds[4] + 3)
    assert (logits(base, run, table)[first] - logits(base, run)[first]).abs().max() < 1e-5


def test_rows_mean_the_same_on_a_base_that_runs_one_by_one(base: CausalLM, tiny: Path) -> None:
    """State-space models and the like are run sequence by sequence; their table of segments goes with them."""
    run = flat_run((9, 5, 14))
    single = load_base(str(tiny))
    single.supports_packing = False
    single.model.set_attn_implementation("eager")
    for each in (base, single):
        put(each, "a")
    table = Segments(spans=(Segment(2, 9, "a"), Segment(11, 20, "a", 0.5)))
    assert (logits(base, run, table) - logits(base, run)).abs().max() > 0.01
    assert (logits(base, run, table) - logits(single, run, table)).abs().max() < 1e-5


def test_a_sum_of_adapters_is_the_sum_of_their_updates(base: CausalLM, tiny: Path) -> None:
    """Weights of several adapters, against the same weighted sum merged by hand."""
    put(base, "a")
    put(base, "b", seed=2)
    run = flat_run(LENGTHS)
    plain = load_base(str(tiny))
    with torch.no_grad():
        for path, module in plain.model.named_modules():
            if isinstance(module, torch.nn.Linear) and path != "lm_head":
                deltas = base.model.get_submodule(path).deltas  # type: ignore[union-attr]
                zero = torch.zeros_like(module.weight)
                module.weight += 0.7 * deltas["a"].merged_weight(zero)
                module.weight -= 1.3 * deltas["b"].merged_weight(zero)
    table = Segments(global_adapters=(("a", 0.7), ("b", -1.3)))
    assert (logits(base, run, table) - logits(plain, run)).abs().max() < 1e-4


def test_a_route_is_its_threads_own(base: CausalLM) -> None:
    import threading

    put(base)
    seen = []
    with base.forward_context.use(Segments.on_all_tokens("a")):
        thread = threading.Thread(target=lambda: seen.append(base.forward_context.segments))
        thread.start()
        thread.join()
        assert base.forward_context.segments == Segments.on_all_tokens("a")
    assert seen == [Segments()] == [base.forward_context.segments]


# cached = recomputed, batched = alone


@pytest.mark.slow
def test_generation_with_the_cache_is_generation_without(base: CausalLM) -> None:
    adapter = put(base)
    prompts = [flat_run((n,), seed=n)[0].tolist() for n in (1, 7, 30, 4, 5)]
    sampling = SamplingParams(max_new_tokens=24)
    batched = generate_tokens(base, prompts, sampling, adapter.active)
    assert batched == reference_tokens(base, prompts, sampling, adapter.active)
    for prompt, answer in zip(prompts, batched, strict=True):
        assert generate_tokens(base, [prompt], sampling, adapter.active) == [answer]
        tokens = list(prompt)
        for token in answer:
            run = torch.tensor(tokens), torch.arange(len(tokens)), (0, len(tokens))
            assert logits(base, run, Segments.on_all_tokens("a"))[-1].argmax() == token
            tokens.append(token)
    assert len({tuple(answer) for answer in batched}) == len(prompts)
    assert batched != generate_tokens(base, prompts, sampling)


def test_a_stopped_sequence_leaves_the_others_as_they_were(base: CausalLM) -> None:
    prompts = [flat_run((n,), seed=n)[0].tolist() for n in (5, 12, 8)]
    long = generate_tokens(base, prompts, SamplingParams(max_new_tokens=20))
    stop = long[1][3]
    expected = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in long]
    assert (
        generate_tokens(base, prompts, SamplingParams(max_new_tokens=20), stop_token_ids=[stop])
        == expected
    )
    assert len(expected[1]) <= 4 < len(expected[0])


def test_sampling_follows_its_seed_and_top_p(base: CausalLM) -> None:
    prompts = [flat_run((6,), seed=n)[0].tolist() for n in range(3)]

    def sample(seed: int, top_p: float = 1.0) -> list[list[int]]:
        return generate_tokens(
            base, prompts, SamplingParams(12, temperature=1.0, top_p=top_p, seed=seed)
        )

    assert sample(1) == sample(1) != sample(2)
    assert sample(1, top_p=1e-6) == generate_tokens(base, prompts, SamplingParams(12))


# dropout


def test_dropout_only_in_training(base: CausalLM) -> None:
    adapter = put(base, dropout=0.5)
    run, on = flat_run(LENGTHS), Segments.on_all_tokens("a")
    assert torch.equal(logits(base, run, on), logits(base, run, on))
    adapter.train(True)
    assert not torch.equal(logits(base, run, on), logits(base, run, on))
    assert torch.equal(logits(base, run), logits(base, run))

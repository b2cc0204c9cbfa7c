"""Choosing by the query: the adapter whose own prompts are closest, a resident one when close, else the base."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import afina
from afina.adapters.segments import Segments
from afina.data.renderer import Renderer
from afina.engine.adapter_router import AdapterRouter
from afina.engine.routing_profile import (
    FILE,
    LEAST,
    ChatFrame,
    PromptEmbedder,
    build_profile,
    read_profile,
    write_profile,
)
from afina.errors import AdapterError
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.models.packed_attention import AttentionMetadata as Boundaries
from helpers import put, write_rows

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from skills import SKILLS, queries


@pytest.fixture(scope="module")
def embedded() -> CausalLM:
    return load_base(dtype="float32")


class Flat:
    """Prompts of one token as points of a plane, so that what is chosen can be told by hand."""

    key = "flat"
    rows = torch.randn(400, 1, 2, generator=torch.Generator().manual_seed(1))

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        return self.rows[[prompt[0] % 400 for prompt in prompts]]


def points(*angles: float) -> Tensor:
    """Points (k, 1, 2) in these directions (degrees)."""
    turned = torch.deg2rad(torch.tensor(angles))
    return torch.stack([turned.cos(), turned.sin()], -1)[:, None] * 3


# the embedding


def test_the_embedding_is_the_mean_of_the_bases_own_states_whatever_the_batch(
    base: CausalLM,
) -> None:
    prompts = [[5, 6, 7], [9], list(range(10, 30))]
    made = PromptEmbedder(base)(prompts)
    for prompt, vector in zip(prompts, made, strict=True):
        whole = base.model(
            torch.tensor([prompt]),
            output_hidden_states=True,
            use_cache=False,
            attention_mask=None,
            flat=Boundaries((0, len(prompt))),
        )
        expected = torch.stack([whole.hidden_states[layer][0].mean(0) for layer in (0, 2)])
        assert torch.allclose(vector, expected, atol=1e-5)
    words = torch.stack(
        [base.model.get_input_embeddings()(torch.tensor(p)).mean(0) for p in prompts]
    )
    assert torch.allclose(made[:, 0], words, atol=1e-6)


def test_the_embedding_does_not_see_adapters_and_reads_the_ends_of_long_prompts(
    base: CausalLM,
) -> None:
    embedding, prompt = PromptEmbedder(base), [5, 6, 7, 8]
    before = embedding([prompt])
    put(base)
    with base.forward_context.use(Segments.on_all_tokens("a")):
        assert torch.equal(embedding([prompt]), before)
    half = base.max_positions // 2
    middle = [[5] * half + [n] * 300 + [6] * half for n in (9, 11)]
    assert torch.equal(embedding([middle[0]]), embedding([middle[1]]))


def test_the_frame_leaves_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    for template in (None, "chatml"):
        renderer = Renderer(tokenizer, template, 192)
        frame = ChatFrame.of(renderer)
        chat = [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "say sol"},
            {"role": "assistant", "content": "sol"},
            {"role": "user", "content": "and the mar?"},
        ]
        assert tokenizer.decode(frame.question(renderer.prompt("say sol"))).strip() == "say sol"
        assert tokenizer.decode(frame.question(renderer.prompt(chat))).strip() == "and the mar?"
        assert frame.question([7, 8, 9]) == [7, 8, 9]
    plain = ChatFrame.of(Renderer(tokenizer, "plain", 192))
    assert plain.question([7, 8, 9]) == [7, 8, 9]


# the profile


def test_a_profile_is_means_of_at_least_four_prompts_and_no_text() -> None:
    flat = Flat()
    for n in (4, 7, 8, 50, 500):
        profile = build_profile(flat, [[i + 1] for i in range(n)])
        assert profile is not None and 1 <= len(profile) <= 16 and n // len(profile) >= LEAST
        seen = min(n, 128)
        if n <= 128 and n % len(profile) == 0:  # groups of one size: their mean is the mean of all
            assert torch.allclose(
                profile.mean(0), flat([[i + 1] for i in range(seen)]).mean(0), atol=1e-5
            )
    assert build_profile(flat, [[1], [2], [3], []]) is None


def test_a_profile_finds_the_groups_that_are_there() -> None:
    class Two(Flat):
        rows = torch.cat([points(*[10.0] * 8), points(*[200.0] * 8)])

    profile = build_profile(Two(), [[i] for i in range(16)])
    assert profile is not None
    directions = {round(float(torch.rad2deg(torch.atan2(p[0, 1], p[0, 0]))) % 360) for p in profile}
    assert directions == {10, 200}


def test_a_profile_on_disk(tmp_path: Path) -> None:
    profile = torch.randn(3, 2, 8)
    assert read_profile(tmp_path, "k") is None
    write_profile(tmp_path, profile, "k")
    back = read_profile(tmp_path, "k")
    assert back is not None and torch.equal(back, profile)
    assert read_profile(tmp_path, "another base") is None
    write_profile(tmp_path, profile * float("nan"), "k")
    with pytest.raises(AdapterError, match="no profile"):
        read_profile(tmp_path, "k")
    (tmp_path / FILE).write_bytes(b"{}")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_profile(tmp_path, "k")


# the choice


def test_the_closest_is_chosen_a_resident_one_when_close_and_else_the_base(base: CausalLM) -> None:
    choosing = AdapterRouter(base, threshold=0.5, margin=0.05, embedding=Flat())
    assert choosing.route([1]).name is None
    choosing.add_profile("east", points(0))
    choosing.add_profile("north east", points(40))
    choosing.add_profile("west", points(180))
    assert choosing.route(points(3)[0]).name == "east"
    assert choosing.route(points(30)[0]).name == "north east"
    assert "closest" in choosing.route(points(30)[0]).why
    assert choosing.route(points(19)[0], resident={"north east"}).name == "north east"
    assert "resident" in choosing.route(points(19)[0], resident={"north east"}).why
    assert choosing.route(points(3)[0], resident={"north east", "unheard of"}).name == "east"
    away = choosing.route(points(270)[0], resident={"west"})
    assert away.name is None and away.score < 0.5 and "base answers" in away.why
    theirs = choosing.route(points(3)[0], among={"north east", "west"})
    assert theirs.name == "north east" and "'east'" not in theirs.why
    assert choosing.route(points(3)[0], among=set()).name is None
    choosing.remove_profile("east")
    choosing.remove_profile("east")
    assert choosing.route(points(3)[0]).name == "north east"
    choosing.add_profile("north east", points(180))
    choosing.add_profile("west", points(3))
    assert choosing.route(points(3)[0]).name == "west"
    with pytest.raises(AdapterError, match="of another embedding"):
        choosing.add_profile("other", torch.zeros(1, 2, 2))
    with pytest.raises(AdapterError, match="of another embedding"):
        choosing.add_profile("other", torch.zeros(1, 1, 3))


def test_what_varies_within_each_adapter_counts_less(base: CausalLM) -> None:
    """Two adapters side by side along y, each spread along x: a query far out along x still belongs to its side."""
    generator = torch.Generator().manual_seed(0)

    class Space(Flat):
        rows = torch.randn(400, 1, 3, generator=generator)

    def spread(y: float, n: int) -> Tensor:
        x = torch.linspace(-2, 2, n)
        return torch.stack([x, torch.full((n,), y), torch.full((n,), 1.0)], -1)[:, None]

    choosing = AdapterRouter(base, threshold=-1.0, embedding=Space())
    choosing.add_profile("up", spread(0.4, 4))
    choosing.add_profile("down", spread(-0.4, 5))
    right = [
        choosing.route(torch.tensor([[x, y, 1.0]])).name == ("up" if y > 0 else "down")
        for x in (-3.0, -1.2, 0.3, 1.7, 3.0)
        for y in (0.15, -0.15)
    ]
    blind = AdapterRouter(base, threshold=-1.0, embedding=Space())
    blind._fit_within = lambda: None  # type: ignore[method-assign]
    blind.add_profile("up", spread(0.4, 4))
    blind.add_profile("down", spread(-0.4, 5))
    wrong = [
        blind.route(torch.tensor([[x, y, 1.0]])).name == ("up" if y > 0 else "down")
        for x in (-3.0, -1.2, 0.3, 1.7, 3.0)
        for y in (0.15, -0.15)
    ]
    assert sum(right) >= sum(wrong) and sum(right) >= 8


@pytest.mark.slow
def test_the_embedded_base_chooses_among_six_kinds_of_queries(embedded: CausalLM) -> None:
    renderer = Renderer(embedded.tokenizer, None, embedded.max_positions)
    frame, choosing = ChatFrame.of(renderer), AdapterRouter(embedded)
    kinds = [
        skill
        for skill in SKILLS
        if skill.name in ("sql", "recipe", "units", "capital", "story", "el tiempo")
    ]
    for skill in kinds:
        profile = build_profile(
            choosing.embedding,
            [frame.question(renderer.prompt(q)) for q in queries(skill, 3, 96, "seen")],
        )
        assert profile is not None
        choosing.add_profile(skill.name, profile)
    right = [
        choosing.route(frame.question(renderer.prompt(query))).name == skill.name
        for skill in kinds
        for query in queries(skill, 3, 10, "new wordings")
    ]
    assert sum(right) >= 54  # of 60; by chance 10


@pytest.mark.slow
def test_from_training_to_the_choice(tmp_path: Path, embedded: CausalLM, general: Path) -> None:
    folders = {}
    kinds = [skill for skill in SKILLS if skill.name in ("python", "poem", "el tiempo")]
    for skill in kinds:
        rows = [
            {
                "messages": [
                    {"role": "user", "content": query},
                    {"role": "assistant", "content": "fine"},
                ]
            }
            for query in queries(skill, 0, 40, "seen")
        ]
        data = write_rows(tmp_path / f"{skill.name}.jsonl", *rows)
        run = afina.train(
            data,
            output_dir=tmp_path / skill.name,
            max_steps=1,
            rank=1,
            retention_text=general,
            dtype="float32",
        )
        folders[skill.name] = run.folder / "adapter"
    renderer = Renderer(embedded.tokenizer, None, embedded.max_positions)
    choosing = AdapterRouter(embedded, ChatFrame.of(renderer))
    for name, folder in folders.items():
        profile = read_profile(folder, choosing.embedding.key)
        assert profile is not None and profile.shape == (8, 2, 256)
        assert set(load_file(folder / FILE)) == {"points"}
        choosing.add_profile(name, profile)
    for skill in kinds:
        asked = [renderer.prompt(query) for query in queries(skill, 0, 8, "new wordings")]
        assert [choosing.route(question).name for question in asked].count(skill.name) >= 7
    assert "profile" not in json.loads((folders["poem"] / "afina.json").read_text())

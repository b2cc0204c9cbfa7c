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
from afina.base.flat import Flat as Boundaries
from afina.base.load import load_base
from afina.base.model import Base
from afina.data.template import Renderer
from afina.engine.choosing import Choosing
from afina.engine.profile import FILE, LEAST, BaseEmbedding, Frame, make_profile, read_profile, write_profile
from afina.errors import AdapterError
from afina.segments import Segments
from helpers import put, write_rows

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from skills import SKILLS, queries


@pytest.fixture(scope="module")
def embedded() -> Base:
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


def test_the_embedding_is_the_mean_of_the_bases_own_states_whatever_the_batch(base: Base) -> None:
    prompts = [[5, 6, 7], [9], list(range(10, 30))]
    made = BaseEmbedding(base)(prompts)
    for prompt, vector in zip(prompts, made, strict=True):
        whole = base.model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False, attention_mask=None,
                           flat=Boundaries((0, len(prompt))))  # fmt: skip
        expected = torch.stack([whole.hidden_states[layer][0].mean(0) for layer in (0, 2)])
        assert torch.allclose(vector, expected, atol=1e-5)
    words = torch.stack([base.model.get_input_embeddings()(torch.tensor(p)).mean(0) for p in prompts])
    assert torch.allclose(made[:, 0], words, atol=1e-6)


def test_the_embedding_does_not_see_adapters_and_reads_the_ends_of_long_prompts(base: Base) -> None:
    embedding, prompt = BaseEmbedding(base), [5, 6, 7, 8]
    before = embedding([prompt])
    put(base)
    with base.board.route(Segments.all("a")):
        assert torch.equal(embedding([prompt]), before)
    half = base.context // 2
    middle = [[5] * half + [n] * 300 + [6] * half for n in (9, 11)]
    assert torch.equal(embedding([middle[0]]), embedding([middle[1]]))


def test_the_frame_leaves_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    for template in (None, "chatml"):
        renderer = Renderer(tokenizer, template, 192)
        frame = Frame.of(renderer)
        chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "say sol"},
                {"role": "assistant", "content": "sol"}, {"role": "user", "content": "and the mar?"}]  # fmt: skip
        assert tokenizer.decode(frame.question(renderer.prompt("say sol"))).strip() == "say sol"
        assert tokenizer.decode(frame.question(renderer.prompt(chat))).strip() == "and the mar?"
        assert frame.question([7, 8, 9]) == [7, 8, 9]
    plain = Frame.of(Renderer(tokenizer, "plain", 192))
    assert plain.question([7, 8, 9]) == [7, 8, 9]


# the profile


def test_a_profile_is_means_of_at_least_four_prompts_and_no_text() -> None:
    flat = Flat()
    for n in (4, 7, 8, 50, 500):
        profile = make_profile(flat, [[i + 1] for i in range(n)])
        assert profile is not None and 1 <= len(profile) <= 16 and n // len(profile) >= LEAST
        seen = min(n, 128)
        if n <= 128 and n % len(profile) == 0:  # groups of one size: their mean is the mean of all
            assert torch.allclose(profile.mean(0), flat([[i + 1] for i in range(seen)]).mean(0), atol=1e-5)
    assert make_profile(flat, [[1], [2], [3], []]) is None


def test_a_profile_finds_the_groups_that_are_there() -> None:
    class Two(Flat):
        rows = torch.cat([points(*[10.0] * 8), points(*[200.0] * 8)])

    profile = make_profile(Two(), [[i] for i in range(16)])
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


def test_the_closest_is_chosen_a_resident_one_when_close_and_else_the_base(base: Base) -> None:
    choosing = Choosing(base, threshold=0.5, margin=0.05, embedding=Flat())
    assert choosing.choose([1]).name is None
    choosing.learn("east", points(0))
    choosing.learn("north east", points(40))
    choosing.learn("west", points(180))
    assert choosing.choose(points(3)[0]).name == "east"
    assert choosing.choose(points(30)[0]).name == "north east"
    assert "closest" in choosing.choose(points(30)[0]).why
    assert choosing.choose(points(19)[0], resident={"north east"}).name == "north east"
    assert "resident" in choosing.choose(points(19)[0], resident={"north east"}).why
    assert choosing.choose(points(3)[0], resident={"north east", "unheard of"}).name == "east"
    away = choosing.choose(points(270)[0], resident={"west"})
    assert away.name is None and away.score < 0.5 and "base answers" in away.why
    theirs = choosing.choose(points(3)[0], among={"north east", "west"})
    assert theirs.name == "north east" and "'east'" not in theirs.why
    assert choosing.choose(points(3)[0], among=set()).name is None
    choosing.forget("east")
    choosing.forget("east")
    assert choosing.choose(points(3)[0]).name == "north east"
    choosing.learn("north east", points(180))
    choosing.learn("west", points(3))
    assert choosing.choose(points(3)[0]).name == "west"
    with pytest.raises(AdapterError, match="not made by this embedding"):
        choosing.learn("other", torch.zeros(1, 2, 2))
    with pytest.raises(AdapterError, match="not made by this embedding"):
        choosing.learn("other", torch.zeros(1, 1, 3))


def test_what_varies_within_each_adapter_counts_less(base: Base) -> None:
    """Two adapters side by side along y, each spread along x: a query far out along x still belongs to its side."""
    generator = torch.Generator().manual_seed(0)

    class Space(Flat):
        rows = torch.randn(400, 1, 3, generator=generator)

    def spread(y: float, n: int) -> Tensor:
        x = torch.linspace(-2, 2, n)
        return torch.stack([x, torch.full((n,), y), torch.full((n,), 1.0)], -1)[:, None]

    choosing = Choosing(base, threshold=-1.0, embedding=Space())
    choosing.learn("up", spread(0.4, 4))
    choosing.learn("down", spread(-0.4, 5))
    right = [choosing.choose(torch.tensor([[x, y, 1.0]])).name == ("up" if y > 0 else "down")
             for x in (-3.0, -1.2, 0.3, 1.7, 3.0) for y in (0.15, -0.15)]  # fmt: skip
    blind = Choosing(base, threshold=-1.0, embedding=Space())
    blind._fit_within = lambda: None  # type: ignore[method-assign]
    blind.learn("up", spread(0.4, 4))
    blind.learn("down", spread(-0.4, 5))
    wrong = [blind.choose(torch.tensor([[x, y, 1.0]])).name == ("up" if y > 0 else "down")
             for x in (-3.0, -1.2, 0.3, 1.7, 3.0) for y in (0.15, -0.15)]  # fmt: skip
    assert sum(right) >= sum(wrong) and sum(right) >= 8


def test_the_embedded_base_chooses_among_six_kinds_of_queries(embedded: Base) -> None:
    renderer = Renderer(embedded.tokenizer, None, embedded.context)
    frame, choosing = Frame.of(renderer), Choosing(embedded)
    kinds = [skill for skill in SKILLS if skill.name in ("sql", "recipe", "units", "capital", "story", "el tiempo")]
    for skill in kinds:
        profile = make_profile(choosing.embedding, [frame.question(renderer.prompt(q)) for q in queries(skill, 3, 96, "seen")])
        assert profile is not None
        choosing.learn(skill.name, profile)
    right = [
        choosing.choose(frame.question(renderer.prompt(query))).name == skill.name
        for skill in kinds
        for query in queries(skill, 3, 10, "new wordings")
    ]
    assert sum(right) >= 54  # of 60; by chance 10


def test_from_training_to_the_choice(tmp_path: Path, embedded: Base, general: Path) -> None:
    folders = {}
    kinds = [skill for skill in SKILLS if skill.name in ("python", "poem", "el tiempo")]
    for skill in kinds:
        rows = [{"messages": [{"role": "user", "content": query}, {"role": "assistant", "content": "fine"}]}
                for query in queries(skill, 0, 40, "seen")]  # fmt: skip
        data = write_rows(tmp_path / f"{skill.name}.jsonl", *rows)
        run = afina.train(data, out=tmp_path / skill.name, steps=1, rank=1, general=general, dtype="float32")
        folders[skill.name] = run.folder / "adapter"
    renderer = Renderer(embedded.tokenizer, None, embedded.context)
    choosing = Choosing(embedded, Frame.of(renderer))
    for name, folder in folders.items():
        profile = read_profile(folder, choosing.embedding.key)
        assert profile is not None and profile.shape == (8, 2, 256)
        assert set(load_file(folder / FILE)) == {"points"}
        choosing.learn(name, profile)
    for skill in kinds:
        asked = [renderer.prompt(query) for query in queries(skill, 0, 8, "new wordings")]
        assert [choosing.choose(question).name for question in asked].count(skill.name) >= 7
    assert "profile" not in json.loads((folders["poem"] / "afina.json").read_text())

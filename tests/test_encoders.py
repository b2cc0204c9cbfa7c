"""Encoders: embeddings of texts, rerankers and token labels: losses, scores, runs and what they keep."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from afina.adapters.active import BASE_ONLY
from afina.data.schemas import EMBEDDING, RELEVANCE, TAGGED, EmbeddingRow
from afina.data.table import detect_schema, read_table
from afina.errors import BaseError, DataError, SettingsError
from afina.evaluation.evaluate import evaluate
from afina.evaluation.generate import generate
from afina.io.strict_json import read_json_object
from afina.merging.merge_into_base import merge
from afina.merging.sources import chat_record, open_sources
from afina.models.encoder import EMBEDDING_KEY, EmbeddingConfig, Encoder, load_encoder
from afina.objectives.embedding import EmbeddingObjective
from afina.objectives.entity_scores import are_entity_tags, find_entities, tag_scores
from afina.objectives.label_tasks import LabelTask
from afina.objectives.ranking_scores import RankedItems, ranking_scores
from afina.objectives.tagging import encode_words
from afina.objectives.text_pairs import PairTable, known_positives, tokenize_pairs
from afina.settings.objectives import EmbedSettings
from afina.training.train import train
from helpers import write_rows

COLORS = ("red", "green", "blue", "pink", "gray", "white", "black", "brown")
NAMES = ("rojo", "verde", "azul", "rosa", "gris", "blanco", "negro", "pardo")
WORDS = ("what", "is", "the", "color", "a", "thing", *COLORS, *NAMES)
PAIRS = [
    {"anchor": f"what is {color}", "positive": f"the {name} thing"}
    for color, name in zip(COLORS, NAMES, strict=True)
]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of one layer, without a head, and its tokenizer of words."""
    folder = tmp_path_factory.mktemp("small")
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    core = Tokenizer(models.WordPiece({w: n for n, w in enumerate(known)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), known, strict=False))
    T.PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = T.BertConfig(
        vocab_size=len(known),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    T.BertModel(config).save_pretrained(folder)
    return folder


def objective(base: Encoder, *records: dict[str, Any], **options: Any) -> EmbeddingObjective:
    rows = [
        EmbeddingRow(
            f"a:{n}", r["anchor"], (r["positive"],), tuple(r.get("negative", ())), r.get("score")
        )
        for n, r in enumerate(records)
    ]
    pairs = tokenize_pairs(base, rows, 32, 1.0, None)
    return EmbeddingObjective(base, pairs, pairs, 64, 1, 0, EmbedSettings(**options))


# ---- embeddings


@torch.no_grad()
def test_losses_of_pairs_are_those_of_the_formulas(small: Path) -> None:
    """Every other positive and negative is a negative once; the anchor and its positives are none."""
    base = load_encoder(str(small), device="cpu")
    assert base.packed is not None
    alone = T.BertModel.from_pretrained(small, add_pooling_layer=False).eval()

    def vector(text: str) -> Tensor:
        """The mean of the hidden states of a text, unit length, float64: without a batch."""
        tokens = torch.tensor([base.encode(text)])
        hidden = alone(input_ids=tokens).last_hidden_state[0].double().mean(0)
        return hidden / hidden.norm()

    rows = [*PAIRS[:3], {**PAIRS[3], "negative": ["the color", PAIRS[0]["positive"]]}]
    rows += [{"anchor": PAIRS[0]["anchor"], "positive": "a thing"}]  # a second positive of it
    rows += [{"anchor": "the color", "positive": PAIRS[1]["positive"]}]  # a candidate as anchor
    own = objective(base, *rows, scale=7.0)
    batch = own.collate(own.train, 0)
    candidates = dict.fromkeys(
        text for row in rows for text in (row["positive"], *row.get("negative", ()))
    )
    known = {PAIRS[0]["anchor"]: {PAIRS[0]["positive"], "a thing"}}
    expected = []
    for row in rows:
        left_out = {row["anchor"], *known.get(row["anchor"], ())} - {row["positive"]}
        kept = [text for text in candidates if text not in left_out]
        anchor = vector(row["anchor"])
        scores = torch.stack([7 * (anchor @ vector(text)) for text in kept])
        expected.append(float(scores.logsumexp(0) - scores[kept.index(row["positive"])]))
    assert own.loss(batch, BASE_ONLY).item() == pytest.approx(sum(expected), abs=1e-4)
    losses = [loss for loss, _ in own.row_losses(own.train, BASE_ONLY)]
    assert losses == pytest.approx(expected, abs=1e-5)
    shards = [batch.shard(n, 4) for n in range(4)]
    assert sum(own.num_targets(shard) for shard in shards) == len(rows)
    total = sum(own.loss(shard, BASE_ONLY).item() for shard in shards)
    assert total == pytest.approx(sum(expected), abs=1e-4)
    scored = objective(base, *[{**pair, "score": n / 4 - 1} for n, pair in enumerate(PAIRS)])
    cosines = [vector(p["anchor"]) @ vector(p["positive"]) for p in PAIRS]
    expected = [float((cosine - (n / 4 - 1)) ** 2) for n, cosine in enumerate(cosines)]
    found = [loss for loss, _ in scored.row_losses(scored.train, BASE_ONLY)]
    assert found == pytest.approx(expected, abs=1e-5)


def test_scores_of_rankings() -> None:
    scores = torch.tensor([0.9, 0.5, 0.5, 0.1])
    one = RankedItems.of(scores, [2], [1.0])  # ties: the irrelevant item comes first
    assert one.ranks == [3] and one.reciprocal_rank == 1 / 3 and one.ndcg == pytest.approx(0.5)
    two = RankedItems.of(scores, [0, 3], [1.0, 2.0])
    assert two.ranks == [1, 4]
    best = 2 + 1 / 1.584962500721156
    assert two.ndcg == pytest.approx((1 + 2 / 2.321928094887362) / best)
    late = RankedItems(ranks=[11], gains=[1.0])
    assert late.ndcg == late.reciprocal_rank == 0
    assert ranking_scores([one, late])["mrr_at_10"] == pytest.approx(100 / 6)
    assert ranking_scores([two, late])["accuracy_at_1"] == 50


@pytest.mark.parametrize(
    ("record", "format", "positives", "negatives", "score"),
    [
        ({"query": "q a", "passage": "p"}, "text-pairs", ("p",), (), None),
        ({"sentence1": "q a", "sentence2": "p", "score": "0.5"}, "scored-pairs", ("p",), (), 0.5),
        ({"sentence1": "q a", "sentence2": "p", "label": 3.5}, "scored-pairs", ("p",), (), 3.5),
        ({"anchor": "q a", "positive": "p", "negative": "n"}, "triplets", ("p",), ("n",), None),
        ({"query": "q a", "pos": ["p", "o"], "neg": ["n"]}, "triplets", ("p", "o"), ("n",), None),
        (
            {"query": "q a", "positive": "p", "negative_1": "n", "negative_2": "m"},
            "triplets",
            ("p",),
            ("n", "m"),
            None,
        ),
    ],
)
def test_rows_of_pairs(
    record: dict[str, Any], format: str, positives: Any, negatives: Any, score: Any, tmp_path: Path
) -> None:
    table = read_table(write_rows(tmp_path / "a.jsonl", record, record), EMBEDDING)
    row = table.rows[0]
    assert (table.format, row.anchor, table.unused_columns) == (format, "q a", {})
    assert (row.positives, row.negatives, row.score) == (positives, negatives, score)
    kept = read_table(write_rows(tmp_path / "b.jsonl", row.record()), EMBEDDING)
    assert kept.rows[0] == EmbeddingRow(f"{tmp_path}/b.jsonl:1", "q a", *positives_of(row))


def positives_of(row: EmbeddingRow) -> tuple[Any, ...]:
    return row.positives, row.negatives, row.score


@pytest.mark.parametrize(
    ("records", "what"),
    [
        ([{"anchor": "a", "positive": "b", "negative": "b"}], "positive and negative"),
        ([{"anchor": "a", "positive": ""}], "is empty"),
        ([{"anchor": "a", "positive": "b", "score": "high"}], "expected a number"),
        ([{"anchor": "a", "positive": "b", "negative": "c", "score": 1}], "several texts"),
        ([{"anchor": "a", "positive": "b", "score": 1}, PAIRS[0]], "score is missing"),
        ([{"anchor": "a", "note": "b"}], "no two columns of texts"),
    ],
)
def test_bad_pairs_are_refused(records: list[Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=what) as caught:
        read_table(write_rows(tmp_path / "a.jsonl", *records), EMBEDDING)
    assert str(tmp_path) in str(caught.value.where)


def test_pairs_are_recognized_by_the_name_of_the_positive(tmp_path: Path) -> None:
    for record, name in (
        (PAIRS[0], "embedding"),
        ({"query": "a b", "pos": ["c"], "neg": ["d"]}, "embedding"),
        ({"sentence1": "a b", "sentence2": "c", "label": 1}, "labeled"),
    ):
        found = detect_schema(write_rows(tmp_path / "a.jsonl", record), {})
        assert found is not None and found.schema.name == name


@pytest.mark.parametrize(
    "mode", ["mean", "cls", "max", "mean_sqrt_len", "weightedmean", "lasttoken"]
)
def test_pooling_reads_no_padding(mode: str) -> None:
    torch.manual_seed(0)
    config, hidden = EmbeddingConfig(mode, normalize=False), torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    alone = config.pool(hidden[:1, :3], mask[:1, :3])
    assert torch.allclose(config.pool(hidden, mask)[:1], alone)
    first = hidden[0, :3]
    weights = torch.tensor([1.0, 2, 3])[:, None]
    expected = {
        "mean": first.mean(0),
        "cls": first[0],
        "max": first.amax(0),
        "mean_sqrt_len": first.sum(0) / 3**0.5,
        "weightedmean": (first * weights).sum(0) / 6,
        "lasttoken": first[2],
    }[mode]
    assert torch.allclose(alone[0], expected)


def test_files_of_sentence_transformers_say_how_a_text_becomes_a_vector(tmp_path: Path) -> None:
    assert EmbeddingConfig.of(tmp_path) == EmbeddingConfig("mean", normalize=True)
    one = EmbeddingConfig("cls", False, "query: ", True, 77)
    one.save(tmp_path, 16)
    assert EmbeddingConfig.of(tmp_path) == one
    assert EmbeddingConfig.from_record(one.record(), "run.json") == one
    modules = json.loads((tmp_path / "modules.json").read_text())
    dense = [*modules, {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(dense))
    with pytest.raises(BaseError, match="Dense"):
        EmbeddingConfig.of(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": false}')
    with pytest.raises(BaseError, match="its pooling is missing"):
        EmbeddingConfig.of(tmp_path)


@pytest.mark.slow
def test_embeddings_are_trained_evaluated_used_and_merged(small: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "pairs.jsonl", *PAIRS)
    values: dict[str, Any] = {"base": str(small), "eval_data": rows, "device": "cpu"}
    values |= {"max_steps": 30, "learning_rate": 1e-2, "embed": {"pairs_per_batch": 8}}
    run = train(rows, objective="embed", output_dir=tmp_path / "run", **values)
    scores = run.record["embedding"]
    assert scores["after"]["ndcg_at_10"] > max(90, scores["before"]["ndcg_at_10"])
    assert "nDCG@10" in run.verdict[0] and "8 eval queries" in run.verdict[0]
    for record in (run.record["data"], read_json_object(run.folder / "adapter" / "afina.json")):
        assert EmbeddingConfig.from_record(record[EMBEDDING_KEY], "") == EmbeddingConfig("mean")
    again = evaluate(run.folder)
    assert again["after"]["ndcg_at_10"] == scores["after"]["ndcg_at_10"]
    assert again["after"]["loss"] == pytest.approx(run.record["losses"]["eval_loss_after"])
    near = generate(["what is red"], adapter=run.folder)["answers"][0]
    assert near["text"] == "the rojo thing" and len(near["embedding"]) == 16
    alone = generate(["what is red"], adapter=run.folder / "adapter")["answers"][0]
    assert alone["embedding"] == near["embedding"]  # without the run's files
    assert chat_record(open_sources([run.folder]))[EMBEDDING_KEY] == {**vars(EmbeddingConfig())}
    merged = merge(run.folder, output_dir=tmp_path / "merged")
    assert merged["kl"] < 1e-5
    whole = load_encoder(str(tmp_path / "merged"), device="cpu")
    assert whole.embedding == EmbeddingConfig("mean")
    assert torch.allclose(
        whole.embed(whole.batch([whole.encode("what is red")]))[0],
        torch.tensor(near["embedding"]),
        atol=1e-5,
    )


@pytest.mark.slow
def test_options_of_other_rows_and_scores_beyond_one_are_refused(
    small: Path, tmp_path: Path
) -> None:
    scored = [{**pair, "score": n} for n, pair in enumerate(PAIRS)]
    rows = write_rows(tmp_path / "scored.jsonl", *scored)
    common: dict[str, Any] = {"objective": "embed", "base": str(small), "device": "cpu"}
    with pytest.raises(DataError, match="is no cosine") as caught:
        train(rows, output_dir=tmp_path / "a", **common)
    assert "--embed.max-score" in str(caught.value.hint)
    for data, option in (
        (rows, {"scale": 5.0}),
        (write_rows(tmp_path / "pairs.jsonl", *PAIRS), {"max_score": 5.0}),
    ):
        with pytest.raises(SettingsError, match="has no effect"):
            train(data, output_dir=tmp_path / "a", embed=option, **common)
    run = train(rows, output_dir=tmp_path / "b", embed={"max_score": 7.0}, max_steps=2, **common)
    assert set(run.record["embedding"]["after"]) >= {"spearman", "pearson"}


def test_table_of_pairs_has_each_text_once(small: Path) -> None:
    base = load_encoder(str(small), device="cpu")
    rows = [
        EmbeddingRow(f"a:{n}", f"what is {color}", ("a thing",)) for n, color in enumerate(COLORS)
    ]
    pairs = tokenize_pairs(base, rows, 32, 1.0, None)
    table = PairTable.of(pairs, known_positives(pairs))
    assert len(table.texts) == 9 and len(table.candidates) == 1  # one positive, no negative


# ---- rerankers


def test_relevance_is_a_probability_with_its_loss_and_scores() -> None:
    task = LabelTask("relevance", ("relevance",))
    logits = torch.tensor([[2.0], [1.0], [-1.0], [-2.0]])
    targets = torch.tensor([[1.0], [0.0], [0.25], [1.0]])
    share = logits.sigmoid()
    expected = -(targets * share.log() + (1 - targets) * (1 - share).log())[:, 0]
    assert torch.allclose(task.losses(logits, targets), expected)
    scores = task.scores(logits, [[1.0], [0.0], [0.0], [1.0]])
    assert scores == {"accuracy": 50.0, "average_precision": pytest.approx(75.0)}
    equal = task.scores(torch.zeros(4, 1), [[1.0], [0.0], [0.0], [1.0]])
    assert equal["average_precision"] == 50  # one score for all ranks none of them first
    assert task.scores(logits, targets.tolist())["spearman"] == pytest.approx(-0.1054, abs=1e-4)
    assert task.answer(logits[0]) == ("relevance", pytest.approx(0.8808, abs=1e-4))


QUERIES = [
    {"query": f"what is {color}", "passage": f"the {name} thing", "label": int(other < 2)}
    for color in COLORS[:4]
    for other, name in enumerate(NAMES[:4])
]


@pytest.mark.slow
def test_rerankers_are_trained_evaluated_and_used(small: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", *QUERIES)
    found = detect_schema(rows, {})
    assert found is not None and found.schema.name == "relevance"
    values: dict[str, Any] = {"base": str(small), "eval_data": rows, "device": "cpu"}
    run = train(rows, output_dir=tmp_path / "run", max_steps=20, learning_rate=1e-2, **values)
    scores = run.record["classes"]
    assert (run.record["objective"], scores["queries"], scores["rows"]) == ("rerank", 4, 16)
    assert scores["ndcg_at_10"] >= max(90, scores["probe"]["ndcg_at_10"])
    assert run.record["score"]["name"] == "nDCG@10" and "4 eval queries" in run.verdict[0]
    again = evaluate(run.folder)
    assert again["classes"]["ndcg_at_10"] == scores["ndcg_at_10"]
    answers = generate(
        ["what is red\tthe rojo thing", "what is red\tthe azul thing"], adapter=run.folder
    )["answers"]
    assert answers[0]["share"] > answers[1]["share"]
    graded = write_rows(tmp_path / "graded.jsonl", *QUERIES[:-1], QUERIES[-1] | {"label": 3})
    with pytest.raises(DataError, match="outside 0 to 1") as caught:
        train(graded, output_dir=tmp_path / "bad", **values)
    assert "--rerank.max-score" in str(caught.value.hint) and ":16:label" in str(caught.value.where)


@pytest.mark.parametrize(
    ("label", "number"), [(1, 1.0), (True, 1.0), ("0", 0.0), ("False", 0.0), (0.5, 0.5)]
)
def test_labels_of_passages(label: Any, number: float, tmp_path: Path) -> None:
    row = {"question": "q a", "document": "p b", "relevance": label}
    parsed = read_table(write_rows(tmp_path / "a.jsonl", row), RELEVANCE).rows[0]
    assert (parsed.content, parsed.pair, parsed.label) == ("q a", "p b", number)


# ---- token labels


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("B-A I-A O B-B", [("A", 0, 2), ("B", 3, 4)]),
        ("I-A I-A B-A O I-B", [("A", 0, 2), ("A", 2, 3), ("B", 4, 5)]),  # IOB1
        ("B-A I-B I-B", [("A", 0, 1), ("B", 1, 3)]),
        ("B-A I-A E-A S-A B-B E-B", [("A", 0, 3), ("A", 3, 4), ("B", 4, 6)]),  # BIOES
        ("B-A I-A L-A U-B", [("A", 0, 3), ("B", 3, 4)]),  # BILOU
        ("E-A E-A I-A", [("A", 0, 1), ("A", 1, 2), ("A", 2, 3)]),
        ("O O", []),
        ("B-per-son I-per-son", [("per-son", 0, 2)]),
    ],
)
def test_entities_of_every_scheme(tags: str, entities: list[tuple[str, int, int]]) -> None:
    assert find_entities(tags.split()) == entities


def test_scores_of_entities_and_words() -> None:
    expected = [["B-A", "I-A", "O", "B-B"], ["O", "B-B"]]
    predicted = [["B-A", "O", "O", "B-B"], ["B-A", "B-B"]]
    scores = tag_scores(predicted, expected)
    assert scores["word_accuracy"] == pytest.approx(100 * 4 / 6)
    assert scores["precision"] == 50 and scores["recall"] == pytest.approx(200 / 3)
    assert scores["f1"] == pytest.approx(100 * 4 / 7)
    assert scores["entities"]["B"] == {"precision": 100, "recall": 100, "f1": 100, "count": 2}
    assert scores["entities"]["A"]["f1"] == 0
    assert tag_scores([["NOUN", "VERB"]], [["NOUN", "NOUN"]]) == {"word_accuracy": 50}
    assert not are_entity_tags(["NOUN", "O"]) and not are_entity_tags(["O"])


CONLL = """-DOCSTART- -X- O

# sent_id = 1
red N B-A
thing N I-A

# X O
"""


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.conll", CONLL, [("red thing", "B-A I-A"), ("#", "O")]),
        ("a.bio", "red\tB-A\nis\tO\n\n\nred\tO", [("red is", "B-A O"), ("red", "O")]),
        ("a.jsonl", '{"words": ["red", "is"], "ner_tags": [1, 0]}', [("red is", "1 0")]),
        (
            "a.jsonl",
            '{"tokens": ["red", "is"], "tags": [1, 0], "names": ["O", "B-A"]}',
            [("red is", "B-A O")],
        ),
        ("a.jsonl", '{"text": ["red", "is"], "label": ["B-A", "O"]}', [("red is", "B-A O")]),
    ],
)
def test_rows_of_tagged_words(
    name: str, content: str, rows: list[tuple[str, str]], tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_text(content)
    table = read_table(file, TAGGED)
    assert [(" ".join(row.words), " ".join(row.tags)) for row in table.rows] == rows
    found = detect_schema(file, {})
    assert found is not None and found.schema.name == "tagged"
    kept = read_table(write_rows(tmp_path / "b.jsonl", *[r.record() for r in table.rows]), TAGGED)
    assert [(row.words, row.tags) for row in kept.rows] == [(r.words, r.tags) for r in table.rows]


@pytest.mark.parametrize(
    ("name", "content", "where", "what"),
    [
        ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', ":1:tags", "2 words and 1 tag"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [null]}', ":1:tags", "name or number of a tag"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [2], "names": ["O"]}', ":1:tags", "has no name"),
        ("a.jsonl", '{"tokens": "a b", "tags": "O O"}', ":1:tokens", "expected a list"),
        ("a.jsonl", '{"tokens": ["a"], "kinds": ["O"]}', "", "no column of tags"),
        ("a.conll", "a N O\nb O\n", ":2", "2 columns, expected 3"),
        ("a.conll", "a\nb\n", ":1", "1 column, expected 2"),
    ],
)
def test_bad_tags_are_refused(
    name: str, content: str, where: str, what: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=what) as caught:
        read_table(tmp_path / name, TAGGED)
    assert caught.value.where == f"{tmp_path / name}{where}"


def test_the_first_token_of_a_word_carries_its_tag(small: Path) -> None:
    base = load_encoder(str(small), device="cpu")
    tokens, places = encode_words(base, ["what", "is,red", "\u200b", "rojo"])
    names = base.tokenizer.convert_ids_to_tokens(tokens)  # type: ignore[union-attr]
    assert names == ["[CLS]", "what", "is", "[UNK]", "red", "rojo", "[SEP]"]
    assert places == (1, 2, -1, 5)


@pytest.mark.slow
def test_tags_are_trained_evaluated_used_and_merged(small: Path, tmp_path: Path) -> None:
    texts = [
        {"tokens": ["what", "is", color, name], "tags": [0, 0, 1, 2]}
        for color, name in zip(COLORS, NAMES, strict=True)
    ]
    texts += [{"tokens": ["the", color], "tags": [0, 1]} for color in COLORS]
    rows = write_rows(tmp_path / "rows.jsonl", *texts)
    values: dict[str, Any] = {"base": str(small), "eval_data": rows, "device": "cpu"}
    values |= {"max_steps": 40, "learning_rate": 2e-2, "tag": {"names": ["O", "B-C", "I-C"]}}
    run = train(rows, objective="tag", output_dir=tmp_path / "run", **values)
    scores = run.record["classes"]
    assert run.record["data"]["labels"] == ["O", "B-C", "I-C"]
    assert scores["f1"] > 90 and scores["entities"]["C"]["count"] == 16
    assert run.record["score"]["name"] == "entity F1"
    again = evaluate(run.folder)
    assert again["classes"]["f1"] == scores["f1"]
    assert again["loss"] == pytest.approx(run.record["losses"]["eval_loss_after"], abs=1e-5)
    answer = generate(["what is red rojo"], adapter=run.folder)["answers"][0]
    assert answer["entities"] == [{"type": "C", "text": "red rojo"}]
    assert answer["text"] == "red rojo (C)"
    assert merge(run.folder, output_dir=tmp_path / "merged")["kl"] < 1e-5

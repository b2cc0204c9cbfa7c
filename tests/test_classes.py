"""Classifiers of text and pictures, and the encoders below them: learned, judged, kept, merged, handed on."""

import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from afina.adapters.attach import detach
from afina.adapters.loading import load_adapter
from afina.adapters.segments import NO_ADAPTERS, Segments
from afina.cli.main import run as run_cli
from afina.data.packing import group_in_order, group_padded
from afina.data.schemas import SFTRow
from afina.errors import AdapterError, AfinaError, BaseError, DataError, SettingsError
from afina.evaluation.confusion import classification_scores, confusion
from afina.evaluation.evaluate import evaluate
from afina.evaluation.generate import generate
from afina.io.strict_json import read_json_object
from afina.merging.merge_into_base import merge, merge_into_base
from afina.models.classifier import Classifier, ImagePreprocessor, load_classifier
from afina.objectives.labeled_data import chunk_texts
from afina.objectives.tagging import encode_words
from afina.planning.plan import plan
from afina.training.train import TrainResult, train
from afina.training.trainer import Trainer
from helpers import afina, same, state, write_rows

GOOD, BAD = ("wonderful", "lovely", "great", "charming"), ("awful", "boring", "terrible", "dull")
THINGS = ("film", "song", "book", "play", "meal", "trip", "game", "show")
REVIEWS = [
    (f"what a {word} {thing} this is", label)
    for label, words in (("good", GOOD), ("bad", BAD))
    for word in words
    for thing in THINGS
]
LOOKING = dict(max_steps=80, max_tokens_per_batch=320, rank=8)
QUICK: dict[str, dict[str, Any]] = {  # what each method needs to learn the easy tasks
    "lora": dict(rank=4, learning_rate=1e-2),
    "dora": dict(rank=4, learning_rate=1e-2),
    "mora": dict(rank=4, learning_rate=1e-2),
    "full": dict(learning_rate=3e-3),
    "freeze": dict(learning_rate=1e-2),
}


METHODS = [pytest.param(m, marks=[] if m in ("lora", "full") else pytest.mark.slow) for m in QUICK]


@pytest.fixture(scope="session")
def words() -> T.PreTrainedTokenizerFast:
    """A word-piece tokenizer with BERT's special tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    known = [
        *special,
        *sorted({word for text, _ in REVIEWS for word in text.split()}),
    ]  # a trained one differs from run to run
    core = Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(known)}, unk_token="[UNK]")
    )
    core.normalizer, core.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    core.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special))
    return T.PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory, words: T.PreTrainedTokenizerFast) -> Path:
    """A random BERT with its masked-token head, float32, two blocks."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    T.BertForMaskedLM(
        T.BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    ).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _vision(kind: str) -> T.PreTrainedModel:
    torch.manual_seed(0)
    if kind == "vit":
        return T.ViTModel(
            T.ViTConfig(
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=64,
                image_size=8,
                patch_size=4,
                num_channels=1,
            ),
            add_pooling_layer=False,
        )
    model = T.ResNetModel(
        T.ResNetConfig(
            num_channels=1,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
        )
    )
    for module in model.modules():
        if isinstance(
            module, nn.BatchNorm2d
        ):  # running means as after training: not those of the rows to come
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="session", params=["vit", "resnet"])
def vision(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ViT or ResNet of 8 x 8 grey pixels, without a head."""
    folder = tmp_path_factory.mktemp(request.param)
    _vision(request.param).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": size, "image_mean": [0.5], "image_std": [0.5]})
    )
    return folder


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *REVIEWS])
    return path


def picture(label: str, rng: random.Random) -> Image.Image:
    """8 x 8 grey noise with a bright stripe, lying or standing."""
    image = Image.new("L", (8, 8))
    image.putdata([rng.randrange(60) for _ in range(64)])
    line = rng.randrange(8)
    for i in range(8):
        image.putpixel((i, line) if label == "lying" else (line, i), 200 + rng.randrange(55))
    return image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder of 60 pictures for each of two classes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), random.Random(0)
    for label in ("lying", "standing"):
        (folder / label).mkdir()
        for number in range(60):
            picture(label, rng).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture
def learn(tmp_path: Path) -> Callable[..., TrainResult]:
    """`train` on the CPU, into a new folder each time."""

    def call(data: Path, base: Path, method: str = "lora", **values: Any) -> TrainResult:
        common = dict(
            objective="classify",
            max_steps=60,
            max_tokens_per_batch=512,
            eval_size=0.25,
            device="cpu",
        )
        name = f"run{len(list(tmp_path.iterdir()))}"
        return train(
            data,
            **{
                **common,
                **QUICK[method],
                "base": str(base),
                "method": method,
                "output_dir": tmp_path / name,
                **values,
            },
        )

    return call


def predict(base: Classifier, contents: list[Any], adapter: str | None) -> torch.Tensor:
    with (
        torch.no_grad(),
        base.forward_context.use(Segments.on_all_tokens(adapter) if adapter else NO_ADAPTERS),
    ):
        return base.logits(base.batch(contents))


def some_texts(base: Classifier) -> list[Any]:
    assert base.tokenizer is not None
    return [base.tokenizer(text)["input_ids"] for text, _ in REVIEWS[::7]]


def some_pictures(base: Classifier) -> list[Any]:
    rng = random.Random(9)
    assert base.images is not None
    return [base.images.resize(picture(label, rng)) for label in ("lying", "standing") * 4]


def opened(run: TrainResult, base: Path) -> Classifier:
    data = run.record["data"]
    return load_classifier(str(base), data["labels"], data["format"] == "pictures", device="cpu")


def is_story_of_a_classifier(run: TrainResult, classes: int = 2) -> None:
    scores = run.record["classes"]
    assert sum(map(sum, scores["confusion"])) == scores["rows"] == run.record["data"]["held_out"]
    assert len(scores["confusion"]) == classes
    assert Image.open(run.folder / "confusion.png").size[0] > 300
    assert {path.name for path in run.folder.iterdir()} >= {
        "run.json",
        "curve.png",
        "README.md",
        "adapter",
        "eval.jsonl",
    }
    assert " row" in (run.folder / "README.md").read_text()
    assert f"accuracy {scores['accuracy']:.1f}%" in (run.folder / "README.md").read_text()


# ---- text


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_texts(learn: Callable[..., TrainResult], table: Path, encoder: Path, method: str) -> None:
    """Every method learns the easy task; saved is loaded; judged again, it is the same; merged is adapted."""
    run = learn(table, encoder, method)
    is_story_of_a_classifier(run)
    assert run.record["classes"]["accuracy"] >= 90
    assert run.record["losses"]["eval_loss_after"] < run.record["losses"]["eval_loss_before"] - 0.2
    assert run.record["verdict"][0].startswith("Learned: accuracy")
    assert "nats per row" in run.record["verdict"][1]
    again = evaluate(run.folder)
    assert again["classes"]["confusion"] == run.record["classes"]["confusion"]
    assert again["loss"] == pytest.approx(run.record["losses"]["eval_loss_after"], abs=1e-5)
    base = opened(run, encoder)
    before = state(base.model)
    adapter = load_adapter(run.folder, base)
    texts = some_texts(base)
    adapted = predict(base, texts, "adapter")
    assert (adapted - predict(base, texts, None)).abs().max() > 0.1
    merged = merge(run.folder, output_dir=run.folder.parent / "merged")
    assert merged["max_logit_difference"] < 1e-4
    whole = load_classifier(str(run.folder.parent / "merged"), base.labels, False, device="cpu")
    assert whole.new_modules == ()
    torch.testing.assert_close(predict(whole, texts, None), adapted, rtol=1e-4, atol=1e-4)
    detach(base.model, adapter)
    assert same(state(base.model), before)


@pytest.mark.slow
def test_jsonl_with_columns_of_its_own(
    learn: Callable[..., TrainResult], tmp_path: Path, encoder: Path
) -> None:
    """Numbers as labels are sorted by value; the columns may have any names."""
    rows = [{"said": text, "stars": 10 if label == "good" else 2} for text, label in REVIEWS]
    run = learn(
        write_rows(tmp_path / "stars.jsonl", *rows),
        encoder,
        columns={"text": "said", "label": "stars"},
    )
    assert run.record["data"]["labels"] == ["2", "10"]
    assert run.record["classes"]["accuracy"] >= 90
    judged = evaluate(
        run.folder, data=tmp_path / "stars.jsonl", columns={"text": "said", "label": "stars"}
    )
    assert judged["rows"] == len(REVIEWS)
    assert judged["classes"]["accuracy"] >= 90
    assert (run.folder / "confusion-eval.png").is_file()


@pytest.mark.slow
def test_labels_beside_texts_are_learned_as_labels(
    learn: Callable[..., TrainResult], table: Path, encoder: Path, tmp_path: Path
) -> None:
    """Nobody who brings labels means them to be passed over; who wants the text alone says so."""
    told = {"base": str(encoder), "device": "cpu"}
    assert plan(table, **told)["data"]["objective"] == "classify"
    answers = write_rows(
        tmp_path / "kto.jsonl",
        *[{"prompt": f"say {x}", "completion": x, "label": True} for x in "abcd"],
    )
    assert plan(answers, device="cpu")["data"]["objective"] == "kto"
    assert plan(table, objective="pretrain", device="cpu")["data"]["objective"] == "pretrain"


@pytest.mark.slow
def test_masked_tokens_then_labels(
    learn: Callable[..., TrainResult], table: Path, encoder: Path, tmp_path: Path
) -> None:
    """An encoder that has read the texts with words hidden, merged, is a base for a classifier."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(text for text, _ in REVIEWS))
    pretrained = learn(text, encoder, "full", objective="mlm", max_steps=120, max_length=16)
    losses = pretrained.record["losses"]
    assert losses["eval_loss_after"] < losses["eval_loss_before"] - 1
    assert "perplexity" in pretrained.record["verdict"][0]
    judged = evaluate(pretrained.folder)
    assert judged["after"]["loss"] < judged["before"]["loss"] - 1
    made = tmp_path / "made"
    merge(pretrained.folder, output_dir=made)
    run = learn(table, made, max_steps=150)
    assert run.record["classes"]["accuracy"] >= 90
    torch.manual_seed(99)  # whatever was drawn before a run, its new head is the same
    again, once = (learn(table, made, max_steps=1) for _ in range(2))
    assert again.record["adapter"] == once.record["adapter"]
    spec = read_json_object(run.folder / "adapter" / "afina.json")["spec"]
    assert spec["modules"] == [
        "bert.pooler.dense",
        "classifier",
    ]  # what masked tokens have no use for is new
    with pytest.raises(AdapterError, match="predicts labels"):
        generate(["hello"], adapter=pretrained.folder)


@pytest.mark.slow
def test_a_decoder_classifies_by_its_last_token(
    learn: Callable[..., TrainResult], table: Path, tiny: Path
) -> None:
    run = learn(table, tiny, "lora", max_steps=40)
    assert run.record["classes"]["accuracy"] >= 75
    assert read_json_object(run.folder / "adapter" / "afina.json")["spec"]["modules"] == ["score"]


@pytest.mark.slow
def test_asked_for_a_class(learn: Callable[..., TrainResult], table: Path, encoder: Path) -> None:
    run = learn(table, encoder)
    answers = generate(
        ["what a lovely film this is", "what a boring song this is"],
        adapter=run.folder,
        device="cpu",
    )["answers"]
    assert [a["text"] for a in answers] == ["good", "bad"]
    assert all(0.5 < a["share"] <= 1 for a in answers)


@pytest.mark.slow
def test_resumed_is_uninterrupted(
    learn: Callable[..., TrainResult], table: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn(table, encoder, max_steps=8, eval_steps=2, dropout=0.1)
    begin = Trainer.start_step

    def cut(self: Trainer) -> Any:
        if self.progress.step == 5:
            raise KeyboardInterrupt
        return begin(self)

    monkeypatch.setattr(Trainer, "start_step", cut)
    out = whole.folder.parent / "cut"
    with pytest.raises(KeyboardInterrupt):
        learn(table, encoder, max_steps=8, eval_steps=2, dropout=0.1, output_dir=out)
    monkeypatch.undo()
    resumed = learn(
        table, encoder, max_steps=8, eval_steps=2, dropout=0.1, output_dir=out, resume=True
    )
    assert resumed.record["adapter"] == whole.record["adapter"]


# ---- pictures


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_pictures(
    learn: Callable[..., TrainResult], pictures: Path, vision: Path, method: str
) -> None:
    """The same for a folder of pictures; BatchNorm's running means are the base's, bit for bit, before and after."""
    longer = {"full": {"learning_rate": 1e-3, "max_steps": 150}, "freeze": {"max_steps": 150}}.get(
        method, {}
    )
    run = learn(pictures, vision, method, **{**LOOKING, **longer})
    is_story_of_a_classifier(run)
    assert run.record["classes"]["accuracy"] >= (
        75 if method == "freeze" else 90
    )  # its first layers stay random
    assert evaluate(run.folder)["classes"]["confusion"] == run.record["classes"]["confusion"]
    base = opened(run, vision)
    means = {name: t.clone() for name, t in base.model.named_buffers() if "running" in name}
    adapter = load_adapter(run.folder, base)
    contents = some_pictures(base)
    adapted = predict(base, contents, "adapter")
    # one by one is together: nothing is normalised over the batch
    alone = torch.cat([predict(base, [content], "adapter") for content in contents])
    torch.testing.assert_close(alone, adapted, rtol=1e-4, atol=1e-4)
    merge_into_base(base, adapter)
    torch.testing.assert_close(predict(base, contents, None), adapted, rtol=1e-4, atol=1e-4)
    after = {name: t for name, t in base.model.named_buffers() if "running" in name}
    assert set(after) == set(means)
    assert all(torch.equal(after[name], t) for name, t in means.items())
    assert merge(run.folder, output_dir=run.folder.parent / "merged")["max_logit_difference"] < 1e-3
    assert (run.folder.parent / "merged" / "preprocessor_config.json").is_file()


@pytest.mark.slow
def test_pictures_in_parquet(
    learn: Callable[..., TrainResult], pictures: Path, vision: Path, tmp_path: Path
) -> None:
    """Bytes, or the hub's struct of bytes and path; the held-out ones are found again by their rows."""
    import pyarrow
    from pyarrow.parquet import write_table

    files = sorted(pictures.glob("*/*.png"))
    rows = [
        {"image": {"bytes": file.read_bytes(), "path": file.name}, "label": file.parent.name}
        for file in files
    ]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "struct.parquet")
    write_table(
        pyarrow.Table.from_pylist(
            [{"img": r["image"]["bytes"], "label": r["label"]} for r in rows]
        ),
        tmp_path / "plain.parquet",
    )
    runs = [
        learn(tmp_path / f"{name}.parquet", vision, **LOOKING, objective="auto")
        for name in ("struct", "plain")
    ]
    assert runs[0].record["classes"] | {"picture": ""} == runs[1].record["classes"] | {
        "picture": ""
    }
    assert runs[0].record["classes"]["accuracy"] >= 90
    assert (
        evaluate(runs[0].folder)["classes"]["confusion"] == runs[0].record["classes"]["confusion"]
    )
    write_table(pyarrow.Table.from_pylist(rows[:-1]), tmp_path / "struct.parquet")
    with pytest.raises(DataError, match="the data has changed"):
        evaluate(runs[0].folder)
    (tmp_path / "struct.parquet").unlink()
    with pytest.raises(DataError, match="the eval images cannot be found"):
        evaluate(runs[0].folder)
    assert evaluate(runs[0].folder, data=pictures)["rows"] == 120


@pytest.mark.slow
def test_full_learns_what_no_layer_owns(
    learn: Callable[..., TrainResult], pictures: Path, tmp_path: Path
) -> None:
    """The class token and the positions of a ViT lie beside layers: full trains them, and the base keeps its own."""
    _vision("vit").save_pretrained(tmp_path / "vit")
    run = learn(pictures, tmp_path / "vit", "full", max_steps=3, classify={"head_init": "random"})
    base = opened(run, tmp_path / "vit")
    before = state(base.model)
    total = sum(p.numel() for p in base.model.parameters())
    assert run.record["trainable_parameters"] == total
    adapter = load_adapter(run.folder, base)
    contents = some_pictures(base)
    adapted, plain = predict(base, contents, "adapter"), predict(base, contents, None)
    moved = [
        path
        for path, delta in adapter.layers.items()
        if path.endswith(("cls_token", "position_embeddings"))
    ]
    assert len(moved) == 2
    for path in moved:
        (trained,) = adapter.layers[path].parameters()
        assert not torch.equal(trained, before[path])
    detach(base.model, adapter)
    assert same(state(base.model), before)
    assert torch.equal(predict(base, contents, None), plain)
    adapter = load_adapter(run.folder, base)
    merge_into_base(base, adapter)
    assert type(base.model.vit.embeddings).__name__ == "ViTEmbeddings"  # type: ignore[union-attr]
    torch.testing.assert_close(predict(base, contents, None), adapted, rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    """A network that transformers has never heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 2)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(pixels)))
        return self.head(torch.relu(self.second(x)).amax((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "mora", "full"])
def test_any_torch_module(pictures: Path, tmp_path: Path, method: str) -> None:
    def made(seed: int = 0) -> Classifier:
        torch.manual_seed(seed)
        return Classifier(
            model=Net(),
            name="my-net",
            labels=("lying", "standing"),
            new_modules=("head",),
            images=ImagePreprocessor((8, 8), (0.5,), (0.5,)),
        )  # type: ignore[arg-type]

    base = made()
    before = state(base.model)
    settings = {
        **QUICK[method],
        "max_steps": 60,
        "max_tokens_per_batch": 320,
        "output_dir": tmp_path / "run",
        "method": method,
        "rank": 8,
    }
    run = train(pictures, model=base, **settings)
    assert run.record["classes"]["accuracy"] >= 90
    assert run.record["base"]["name"] == "my-net"
    fresh = made()
    assert same(state(fresh.model), before)
    assert fresh.hash == base.hash == run.record["base"]["hash"]
    judged = evaluate(run.folder, model=fresh)
    assert judged["classes"]["confusion"] == run.record["classes"]["confusion"]
    with pytest.raises(AdapterError, match="trained on another base"):
        evaluate(run.folder, model=made(1))
    whole = made()
    adapter = load_adapter(run.folder, whole)
    contents = some_pictures(whole)
    adapted = predict(whole, contents, "adapter")
    merge_into_base(whole, adapter)
    assert type(whole.model.first) is nn.Conv2d
    torch.testing.assert_close(predict(whole, contents, None), adapted, rtol=1e-4, atol=1e-4)


# ---- PEFT


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "pictures"])
def test_peft_reads_adapter_and_head(
    learn: Callable[..., TrainResult],
    table: Path,
    encoder: Path,
    pictures: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    """The head travels as modules_to_save: the same logits there, and back."""
    from peft import PeftModel

    source = encoder
    if kind == "pictures":
        _vision("resnet").save_pretrained(source := tmp_path / "resnet")
    run = learn(table if kind == "text" else pictures, source, max_steps=10)
    base = opened(run, source)
    load_adapter(run.folder, base)
    contents = some_texts(base) if kind == "text" else some_pictures(base)
    ours = predict(base, contents, "adapter")
    other = opened(run, source)
    theirs = PeftModel.from_pretrained(other.model, str(run.folder / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.eval()(**other.batch(contents)).logits, ours, rtol=1e-5, atol=1e-5
        )
    theirs.save_pretrained(str(tmp_path / "theirs"))
    third = opened(run, source)
    load_adapter(tmp_path / "theirs", third)
    torch.testing.assert_close(predict(third, contents, "adapter"), ours, rtol=1e-5, atol=1e-5)


# ---- what goes wrong


def rows_with(change: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"text": text, "label": label} for text, label in REVIEWS]
    change(rows)
    return rows


@pytest.mark.parametrize(
    ("change", "settings", "what"),
    [
        (lambda rows: [row.pop("label") for row in rows], {}, "no column of labels"),
        (lambda rows: rows[5].pop("label"), {}, "no label"),
        (lambda rows: [row.update(label="good") for row in rows], {}, "fewer than two classes"),
        (lambda rows: rows[0].update(label=["odd"]), {}, "a label of another type"),
        (lambda rows: rows[0].update(label={"odd": 0.5}), {}, "shares of classes"),
        (lambda rows: rows[7].update(text=" "), {}, "empty text"),
        (lambda rows: None, {"columns": {"label": "lable"}}, "no column 'lable'"),
        (lambda rows: None, {"columns": {"lable": "label"}}, "unknown field 'lable'"),
        (lambda rows: rows[7].update(text="film " * 60), {}, "62 tokens, more than the 32 allowed"),
        (lambda rows: None, {"method": "qlora"}, "NF4 quantization is for causal language models"),
        (
            lambda rows: None,
            {"method": "alora"},
            "an activated adapter needs rows with prompt and completion",
        ),
    ],
)
def test_rows_that_cannot_be(
    learn: Callable[..., TrainResult],
    tmp_path: Path,
    encoder: Path,
    change: Callable[..., None],
    settings: dict[str, Any],
    what: str,
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", *rows_with(change))
    with pytest.raises(AfinaError) as caught:
        learn(data, encoder, **{"method": "lora", **settings}) if settings.get(
            "method"
        ) is None else train(
            data, objective="classify", base=str(encoder), output_dir=tmp_path / "out", **settings
        )
    assert what in caught.value.what
    assert caught.value.where
    if caught.value.what in ("no label", "empty text"):
        assert "rows.jsonl:" in caught.value.where


def test_bad_rows_can_be_left_out(
    learn: Callable[..., TrainResult], tmp_path: Path, encoder: Path
) -> None:
    data = write_rows(
        tmp_path / "rows.jsonl",
        *rows_with(lambda rows: rows[7].update(text="film " * 60) or rows[9].update(text="")),
    )
    run = learn(data, encoder, max_steps=1, skip_bad_rows=True)
    assert len(run.record["data"]["skipped"]) == 2
    assert any("rows.jsonl:8: 62 tokens" in line for line in run.record["data"]["skipped"])


@pytest.mark.slow
def test_a_class_that_training_never_showed(
    learn: Callable[..., TrainResult], table: Path, tmp_path: Path, encoder: Path
) -> None:
    """In the held-out rows, and in those of `eval`; a file of one class alone may be judged on."""
    unseen = write_rows(tmp_path / "odd.jsonl", {"text": "what a film", "label": "odd"})
    with pytest.raises(DataError, match="class 'odd' does not occur in the training") as caught:
        learn(table, encoder, eval_data=unseen, eval_size=0.1)
    assert str(caught.value.where).endswith("odd.jsonl:1")
    assert caught.value.why == "known: bad, good"
    run = learn(table, encoder)
    with pytest.raises(DataError, match="class 'odd' does not occur"):
        evaluate(run.folder, data=unseen)
    one = write_rows(tmp_path / "one.jsonl", {"text": "what a great film this is", "label": "good"})
    assert evaluate(run.folder, data=one)["classes"]["accuracy"] == 100


@pytest.mark.slow
def test_a_broken_picture(
    learn: Callable[..., TrainResult], pictures: Path, tmp_path: Path
) -> None:
    import shutil

    _vision("resnet").save_pretrained(base := tmp_path / "resnet")
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    whole = (folder / "lying" / "3.png").read_bytes()
    for content in (whole[: len(whole) // 2], b"no picture", b""):
        (folder / "lying" / "3.png").write_bytes(content)
        with pytest.raises(DataError, match="not a picture, or a damaged one") as caught:
            learn(folder, base, max_steps=1)
        assert str(caught.value.where).endswith("3.png")
    run = learn(folder, base, max_steps=1, skip_bad_rows=True)
    assert [
        line.partition(": ")[0].endswith("3.png") for line in run.record["data"]["skipped"]
    ] == [True]
    assert run.record["data"]["held_out"] + len(run.record["data"]["skipped"]) <= 120
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no pictures here"):
        learn(tmp_path / "none", base)


@pytest.mark.slow
def test_models_that_do_not_fit(
    learn: Callable[..., TrainResult], table: Path, pictures: Path, encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(BaseError, match="bert cannot classify images"):
        learn(pictures, encoder)
    _vision("resnet").save_pretrained(tmp_path / "resnet")
    with pytest.raises(BaseError, match="resnet cannot classify text"):
        learn(table, tmp_path / "resnet")
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(encoder, damaged := tmp_path / "damaged")
    tensors = {
        name: t
        for name, t in load_file(encoder / "model.safetensors").items()
        if "layer.1.output.dense" not in name
    }
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseError, match="the weights do not fit config.json"):
        learn(table, damaged)
    with pytest.raises(SettingsError, match="a classifier cannot be trained by mlm"):
        train(pictures, model=opened_net(), objective="mlm", output_dir=tmp_path / "x")


def opened_net() -> Classifier:
    return Classifier(
        model=Net(),
        name="net",
        labels=("lying", "standing"),
        images=ImagePreprocessor((8, 8), (0.5,), (0.5,)),
    )  # type: ignore[arg-type]


# ---- figures and words


def test_rows_of_like_length_share_a_batch() -> None:
    """Each row once an epoch, another order each epoch, next to no padding, batches in no order of length."""
    rng = random.Random(0)
    lengths = [rng.randrange(1, 50) for _ in range(1000)]
    epochs = [group_padded(lengths, 400, random.Random(epoch)) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(1000))
        padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
        assert max(padded) <= 400
        assert sum(padded) < 1.1 * sum(lengths)
        means = [sum(lengths[i] for i in batch) / len(batch) for batch in batches]
        assert means != sorted(means)
    assert epochs[0] != epochs[1]
    assert epochs[0] == group_padded(lengths, 400, random.Random(0))


def test_rows_in_order_keep_the_bound_of_tokens() -> None:
    lengths = [3, 5, 2, 9, 1, 1, 30, 4]
    assert group_in_order(lengths, 10, False) == [[0, 1, 2], [3, 4], [5], [6], [7]]
    assert group_in_order(lengths, 10, True) == [[0, 1], [2], [3], [4, 5], [6], [7]]


def test_scores() -> None:
    predicted, expected = [0, 0, 1, 2, 1], [0, 1, 1, 2, 2]
    assert confusion(predicted, expected, 3) == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    scores = classification_scores(
        predicted, expected, 4
    )  # a class that occurs nowhere counts for nothing
    assert scores["accuracy"] == pytest.approx(60)
    assert scores["f1"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 2 / 3) / 3)


@pytest.mark.slow
def test_the_command_line(
    table: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of what transformers has to say about a new head reaches the user; the run ends with what to type next."""
    run = tmp_path / "run"
    done = afina("train", table, "--base", encoder, "--max-steps", 2, "--output-dir", run)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert not any(
        word in said
        for word in ("MISSING", "LOAD REPORT", "newly initialized", "afina chat", "a token")
    )
    # two steps change nothing that six rows could show: the next line trains otherwise
    next_command = read_json_object(run / "run.json")["next_command"]
    assert next_command in said and next_command.startswith("afina train")
    assert "accuracy" in said
    assert run_cli(["eval", str(run)]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert run_cli(["generate", "what a lovely film this is", "--adapter", str(run)]) == 0
    assert capsys.readouterr().out.startswith(("good", "bad"))


def test_examples_of_encoders_are_shown(
    encoder: Path, vision: Path, table: Path, text: Path, pictures: Path
) -> None:
    def show(data: Path, base: Path, objective: str) -> list[dict[str, Any]]:
        common: Any = {"device": "cpu", "show": 2, "show_longest": True}
        return plan(data, base=str(base), objective=objective, **common)["examples"]

    classes = show(table, encoder, "classify")
    assert classes[0]["text"].startswith("[CLS] ") and " [SEP] -> «" in classes[0]["text"]
    assert classes[2]["tokens"] >= classes[0]["tokens"] and classes[2]["is_longest"]
    assert show(text, encoder, "mlm")[0]["text"].endswith("[SEP]")
    first = show(pictures, vision, "classify")[0]
    assert first["text"] == f"{first['where']} (8 x 8) -> «lying»" and first["tokens"] is None


def test_control_tokens_in_texts_stay_text(encoder: Path) -> None:
    base = load_classifier(str(encoder), ("a", "b"), False)
    assert base.tokenizer is not None
    special = {
        base.tokenizer.cls_token_id,
        base.tokenizer.sep_token_id,
        base.tokenizer.mask_token_id,
    }

    def count(tokens: Any) -> int:
        return sum(token in special for token in getattr(tokens, "token_ids", tokens))

    for text in ("a [SEP] film", "[CLS] [MASK]", "a </s> [SEP][SEP] b"):
        assert count(base.encode(text)) == 2
        assert count(base.encode(text, "one [SEP]")) == count(base.encode("a", "one"))
        assert count(base.encode(text, None, 6)) == 2
        [chunk] = chunk_texts(base, [SFTRow("a:1", text=text)], 32)
        assert count(chunk.token_ids) == 2
        assert count(encode_words(base, text.split())[0]) == 2
    # without one, the tokens are those of the tokenizer
    plain = "a film about nothing"
    assert base.encode(plain) == base.tokenizer(plain)["input_ids"]


@pytest.mark.slow
def test_parts_of_a_folder_are_trained_and_evaluated(
    pictures: Path, vision: Path, learn: Callable[..., TrainResult], tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    for label in ("lying", "standing"):
        for number in range(12):
            part = folder / ("train" if number < 8 else "test") / label
            part.mkdir(parents=True, exist_ok=True)
            shutil.copy(pictures / label / f"{number}.png", part)
    run = learn(folder, vision, max_steps=1, eval_size=0.1)
    data = run.record["data"]
    assert (data["rows"], data["held_out"]) == (16, 8)
    assert data["eval_path"] == str(folder / "test")
    assert evaluate(run.folder)["rows"] == 8
    with pytest.raises(SettingsError, match="eval_size .* has no effect"):
        learn(folder, vision, max_steps=1)

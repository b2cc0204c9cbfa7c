"""Encoders on packed rows: the scores of padded ones, for every family whose attention allows it."""

import copy
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

from afina.adapters.segments import NO_ADAPTERS, ForwardContext, Segment, Segments
from afina.models.packed_encoder import PackedEncoder, PackedRows

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 1,
}
DISTILBERT = {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4, "pad_token_id": 1}
ENDS = {"cls_token_id": 3, "sep_token_id": 4, "bos_token_id": 3, "eos_token_id": 4}
# local attention of 8 tokens, so that rows are longer than the window
MODERN = ENDS | {"local_attention": 8, "global_attn_every_n_layers": 3}
PACKED: dict[str, Any] = {
    "bert": T.BertConfig(**SIZES),
    "roberta": T.RobertaConfig(**SIZES),
    "electra": T.ElectraConfig(embedding_size=32, **SIZES),
    "albert": T.AlbertConfig(embedding_size=32, **SIZES),
    "distilbert": T.DistilBertConfig(vocab_size=99, num_labels=3, **DISTILBERT),
    "modernbert": T.ModernBertConfig(**SIZES, **MODERN),
}
PADDED: dict[str, Any] = {
    "deberta": T.DebertaV2Config(**SIZES),  # its attention is its own
    "mpnet": T.MPNetConfig(**SIZES),
    "llama": T.LlamaConfig(num_key_value_heads=2, **SIZES),  # the head reads the last token
    # the head averages over positions
    "mean": T.ModernBertConfig(classifier_pooling="mean", **SIZES, **MODERN),
}


def model_of(config: Any, kind: Any = T.AutoModelForSequenceClassification) -> T.PreTrainedModel:
    torch.manual_seed(0)
    model = kind.from_config(copy.deepcopy(config)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    return model.requires_grad_(False)


def rows(*lengths: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 99, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": tokens.where(mask.bool(), torch.tensor(1)), "attention_mask": mask}


@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_give_what_padded_ones_give(family: str) -> None:
    model, inputs = model_of(PACKED[family]), rows(30, 12, 3, 29)
    expected = model(**inputs).logits
    packed = PackedEncoder.where_equal(model, ForwardContext(), rows(9, 3, 4))
    assert packed is not None
    found = packed.logits(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    one_by_one = [
        packed.logits({name: tensor[i : i + 1, :length] for name, tensor in inputs.items()})
        for i, length in enumerate((30, 12, 3, 29))
    ]
    torch.testing.assert_close(torch.cat(one_by_one), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", PADDED)
def test_others_stay_padded_and_as_they_were(family: str) -> None:
    model, inputs = model_of(PADDED[family]), rows(30, 12, 3)
    expected = model(**inputs).logits
    assert PackedEncoder.where_equal(model, ForwardContext(), rows(9, 3, 4)) is None
    assert torch.equal(model(**inputs).logits, expected)


def test_token_scores_are_those_of_the_tokens_without_padding() -> None:
    model, inputs = model_of(PACKED["bert"], T.AutoModelForMaskedLM), rows(30, 12, 3)
    mask = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[mask]
    packed = PackedEncoder.where_equal(model, ForwardContext(), rows(9, 3, 4))
    assert packed is not None
    torch.testing.assert_close(packed.token_logits(inputs), expected, rtol=1e-5, atol=1e-5)


def test_layers_see_segments_of_tokens_and_heads_those_of_rows() -> None:
    model, context, inputs = model_of(PACKED["bert"]), ForwardContext(), rows(5, 2, 4)
    packed = PackedEncoder.where_equal(model, context, rows(9, 3, 4))
    assert packed is not None
    seen: dict[str, Segments] = {}
    layer, head = model.bert.encoder.layer[1].attention.self.query, model.classifier
    layer.register_forward_hook(lambda *_: seen.update(layer=context.segments))
    head.register_forward_hook(lambda *_: seen.update(head=context.segments))
    of_rows = Segments(spans=(Segment(0, 1, "a"), Segment(1, 3, "b", 0.5)), unit="row")
    with context.use(of_rows):
        packed.logits(inputs)
        assert context.segments is of_rows
    assert context.segments is NO_ADAPTERS
    assert seen["head"] is of_rows
    assert seen["layer"].unit == "token"
    assert seen["layer"].spans == (Segment(0, 5, "a"), Segment(5, 11, "b", 0.5))


def test_unpacked_rows_have_their_tokens_in_place() -> None:
    packed = PackedRows.of(rows(3, 1, 2)["attention_mask"])
    assert packed.cu_seqlens == (0, 3, 4, 6)
    assert packed.positions.tolist() == [0, 1, 2, 0, 0, 1]
    hidden = torch.arange(6.0)[None, :, None]
    assert packed.unpack(hidden)[..., 0].tolist() == [[0, 1, 2], [3, 3, 3], [4, 5, 4]]

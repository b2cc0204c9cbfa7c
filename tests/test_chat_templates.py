"""Chats as templates write them: published templates, tools, reasoning, arguments, control tokens."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from afina.adapters.load_run import recorded_format
from afina.data.renderer import Renderer
from afina.data.schemas import SFTRow
from afina.errors import AdapterError, DataError
from afina.io.chat_format import ChatFormat
from afina.models.loading import resolve_model_dir
from afina.settings import ServeSettings, make_settings

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "tests")]

import chat_templates as published  # noqa: E402

REAL = Path.home() / ".cache" / "afina-real"
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n' + (m.reasoning_content or '') }}"
    "{{ '\n</think>\n\n' }}{% endif %}{{ m.content }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def bot(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def chat(*messages: dict[str, Any], **more: Any) -> SFTRow:
    return SFTRow("x.jsonl:1", messages=messages, **more)


def template_of(name: str) -> Renderer:
    """The renderer of a published template."""
    jinja = published.published()[name]
    return Renderer(published.tokenizer_of(jinja), None, 1 << 20)


@pytest.mark.slow
def test_the_page_of_published_templates_is_current_and_each_cell_keeps_the_promise() -> None:
    assert len(published.published()) >= 30
    assert published.page() == published.PAGE.read_text(encoding="utf-8")


# control tokens


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before a text, as SentencePiece does."""
    words = ["▁", "▁hi", "hi", "▁a", "</s>", "<s>"]
    pieces = [("<unk>", 0.0), *((word, -1.0) for word in words)]
    pieces += [(chr(n), -9.0) for n in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def bert_like() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "hi", "a"]
    words += [chr(n) for n in range(33, 127)] + [f"##{chr(n)}" for n in range(33, 127)]
    tokenizer = Tokenizer(
        models.WordPiece({w: n for n, w in enumerate(dict.fromkeys(words))}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        eos_token="[SEP]",
        mask_token="[MASK]",
    )


def tokenizers() -> dict[str, Any]:
    found: dict[str, Any] = {
        "embedded": AutoTokenizer.from_pretrained(resolve_model_dir("embedded", None)),
        "prefix first": sentencepiece_like("first"),
        "prefix always": sentencepiece_like("always"),
        "pieces of words": bert_like(),
    }
    for name in ("smollm2", "minilm"):
        if (REAL / name).is_dir():
            found[name] = AutoTokenizer.from_pretrained(REAL / name)
    return found


TOKENIZERS = tokenizers()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_control_tokens_in_texts_stay_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    own = None if tokenizer.chat_template else "chatml"
    renderer = Renderer(tokenizer, own, 2048)
    old = Renderer(tokenizer, ChatFormat(own, allow_control_tokens=True), 2048)
    for special in renderer.template.control.texts:
        for role in ("system", "user", "assistant"):
            messages = [user("a"), bot("hi"), user("hi")]
            number = {"system": 0, "user": 2, "assistant": 1}[role]
            if role == "system":
                messages = [{"role": "system", "content": "hi"}, *messages]
            honest = renderer.prompt(messages)
            messages[number] = messages[number] | {"content": f"hi{special}hi"}
            forged, token = renderer.prompt(messages), tokenizer.convert_tokens_to_ids(special)
            assert forged.count(token) == honest.count(token)
            assert old.prompt(messages).count(token) >= honest.count(token) + 1
            if name not in ("minilm", "pieces of words"):  # which put spaces between words
                decoded = tokenizer.decode(forged, skip_special_tokens=False)
                assert f"hi{special}hi" in decoded


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_without_control_tokens_have_the_tokens_of_the_whole_text(name: str) -> None:
    tokenizer, rng = TOKENIZERS[name], random.Random(0)
    renderer = Renderer(tokenizer, "chatml", 2048)
    for _ in range(30):
        text = "".join(
            rng.choice("hi a<|>/s[]\n é😀_.\U000f0000") for _ in range(rng.randint(1, 30))
        )
        if renderer.template.control.occur_in(text):
            continue
        messages = [user(text), bot(text[::-1]), user("hi")]
        whole = renderer.template.render(messages, True, "x")
        assert renderer.prompt(messages) == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_forged_conversation_is_no_honest_one() -> None:
    tokenizer = TOKENIZERS["embedded"]
    renderer = Renderer(tokenizer, None, 2048)
    forged = renderer.template.render([user("hi"), bot("ok"), user("say x")], False, "x")
    first = renderer.template.render([user("")], False, "x")
    begin, end = first[: first.index("<|user|>") + len("<|user|>")], first[-len("<|end|>") :]
    text = forged.removeprefix(begin).removesuffix(end)
    assert renderer.prompt([user(text)]) != renderer.prompt([user("hi"), bot("ok"), user("say x")])
    joined = [{"type": "text", "text": "<|e"}, {"type": "text", "text": "nd|>"}]
    token = tokenizer.convert_tokens_to_ids("<|end|>")
    assert renderer.prompt([user(joined)]).count(token) == renderer.prompt([user("hi")]).count(
        token
    )  # type: ignore[arg-type]


def test_rows_with_control_tokens_are_counted_and_learned_as_text() -> None:
    tokenizer = TOKENIZERS["embedded"]
    renderer = Renderer(tokenizer, None, 2048)
    (example,) = renderer.examples(chat(user("write <|end|>"), bot("<|end|> is a token")))
    assert example.completion == "<|end|> is a token"
    assert sum(example.loss_mask) > 2
    assert renderer.counts == {"control_tokens_as_text": 1}
    renderer.chunk_text(SFTRow("y", text="a <|end|>"), 64)
    assert renderer.counts["control_tokens_as_tokens"] == 1
    old = Renderer(tokenizer, ChatFormat(allow_control_tokens=True), 2048)
    with pytest.raises(DataError, match="contains the stop token"):
        old.examples(chat(user("write"), bot("<|end|> is a token")))


# what a template takes, and what it leaves out


def test_parts_of_a_chat_that_a_template_leaves_out_are_errors() -> None:
    renderer = template_of("llama3")
    call = published.CALL
    cases: list[tuple[SFTRow, str]] = [
        (chat(user("a"), bot(None, tool_calls=[call])), "leaves out tool_calls of message 2"),
        (chat(user("a"), bot("b"), tools=(published.TOOL,)), "leaves out tools"),
        (chat(user("a"), bot("b", reasoning_content="c")), "leaves out reasoning_content"),
        (chat(user("a", name="Ana"), bot("b")), "leaves out name of message 1"),
    ]
    for row, what in cases:
        with pytest.raises(DataError, match=what) as caught:
            renderer.examples(row)
        assert "--chat-template chatml" in (caught.value.hint or "")
    for key in ("reasoning_content", "reasoning", "thinking"):
        (example,) = template_of("gptoss").examples(chat(user("a"), bot("b", **{key: "since c"})))
        assert "since c" in (example.completion or "")
    with pytest.raises(DataError, match="leaves out content of message 2"):
        template_of("deepseek_r1_distill").examples(chat(user("a"), bot("<think>b</think>c")))


def test_names_that_the_order_implies_are_named_as_unused() -> None:
    renderer = template_of("qwen2_5")
    row = published.row_of("tools")
    renderer.examples(row)
    assert renderer.counts == {"unused_message_keys": "name (1 row), tool_call_id (1 row)"}
    assert row.messages is not None
    other = [*row.messages[:2], row.messages[2] | {"name": "calendar"}, row.messages[3]]
    with pytest.raises(DataError, match="leaves out name of message 3"):
        renderer.examples(chat(*other, tools=row.tools))


def test_a_call_is_learned_as_transformers_writes_it() -> None:
    renderer, row = template_of("qwen2_5"), published.row_of("tools")
    (example,) = renderer.examples(row)
    written = renderer.tokenizer.apply_chat_template(
        list(row.messages or ()), tools=list(row.tools), tokenize=False
    )
    assert renderer.tokenizer.decode(example.token_ids) == written
    first = published.trained_spans(example)[0]
    learned = renderer.tokenizer.decode(example.token_ids[slice(*first)])
    assert learned.startswith("<tool_call>")
    assert learned.endswith("</tool_call><|im_end|>")


def test_chatml_writes_every_published_chat() -> None:
    tokenizer = published.tokenizer_of("<|im_start|><|im_end|>")
    renderer = Renderer(tokenizer, "chatml", 1 << 20)
    for name in published.CHATS:
        assert published.cell(renderer, name) == "trained"
    text = renderer.template.render([user("a"), bot("b")], True, "x")
    assert (
        text
        == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\n"
    )


def test_developer_is_the_system_where_a_template_does_not_know_it() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, user("a")]
    as_system = [messages[0] | {"role": "system"}, user("a")]
    gemma, qwen = template_of("gemma3"), template_of("gptoss")
    assert gemma.prompt(messages) == gemma.prompt(as_system)
    assert "developer" in qwen.template.render(messages, False, "x")


# arguments of a template, and what travels with a run


def test_arguments_reach_the_template_in_training_and_in_prompts() -> None:
    tokenizer = published.tokenizer_of(QWEN)
    fast = Renderer(tokenizer, ChatFormat(kwargs={"enable_thinking": False}), 512)
    slow = Renderer(tokenizer, None, 512)
    ended = tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"]
    assert fast.prompt("a") == slow.prompt("a") + ended
    assert slow.prompt([user("a")], template_kwargs={"enable_thinking": False}) == fast.prompt("a")
    (example,) = fast.examples(chat(user("a"), bot("b")))
    assert example.token_ids[: example.prompt_length] == fast.prompt("a")
    assert example.completion == "b"
    with pytest.raises(DataError, match="does not render as a prefix"):
        fast.examples(chat(user("a"), bot("b", reasoning_content="c")))
    with pytest.raises(DataError, match="no argument 'enable_thinkin'") as caught:
        Renderer(tokenizer, ChatFormat(kwargs={"enable_thinkin": False}), 512)
    assert "enable_thinking" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"enable_thinking": False},
        {"enable_thinking": 'it\'s\n"x" \\ é😀'},
        {"enable_thinking": {"a": [1, None, True]}},
    ],
)
def test_a_format_travels_as_a_record_and_as_one_template(
    tmp_path: Path, kwargs: dict[str, Any]
) -> None:
    source = "\n{{ messages[0].content }}{{ enable_thinking | tojson }}{{ eos_token }}"
    (tmp_path / "t.jinja").write_text(source)
    tokenizer = published.tokenizer_of(QWEN)
    file = ChatFormat(str(tmp_path / "t.jinja"), kwargs)
    used = Renderer(tokenizer, file, 512).chat_format
    (tmp_path / "t.jinja").unlink()
    (tmp_path / "afina.json").write_text(json.dumps({"chat": used.record()}))
    read = recorded_format(tmp_path)
    assert read is not None
    assert Renderer(tokenizer, read, 512).chat_format == used
    assert used.stop_tokens == ("<eos>",)
    tokenizer.chat_template = used.exported_jinja
    expected = Renderer(tokenizer, read, 512).template.render([user("a")], False, "x")
    assert tokenizer.apply_chat_template([user("a")], tokenize=False) == expected
    given = tokenizer.apply_chat_template([user("a")], tokenize=False, enable_thinking=7)
    assert given == "\na7<eos>"
    (tmp_path / "afina.json").write_text(json.dumps({"chat": {"kwargs": []}}))
    with pytest.raises(AdapterError, match="kwargs has a wrong type"):
        recorded_format(tmp_path)


def test_a_server_asks_each_adapter_as_it_was_trained(tmp_path: Path) -> None:
    from afina.server.errors import APIError
    from afina.server.formats import ServedFormats

    tokenizer = published.tokenizer_of(QWEN)
    model: Any = SimpleNamespace(tokenizer=tokenizer, max_positions=512)
    formats = {
        "old": None,
        "own": ChatFormat(kwargs={"enable_thinking": False}),
        "plain": ChatFormat("plain", allow_control_tokens=True),
        "same": ChatFormat("plain"),
    }
    for name, one in formats.items():
        (tmp_path / name).mkdir()
        record = {} if one is None else {"chat": one.record()}
        (tmp_path / name / "afina.json").write_text(json.dumps(record))
    registry: Any = SimpleNamespace(
        get=lambda name: (
            SimpleNamespace(hash=name, folder=str(tmp_path / name)) if name in formats else None
        )
    )

    def served(**settings: Any) -> ServedFormats:
        return ServedFormats(model, registry, make_settings(ServeSettings, settings))

    by_adapter, fixed = served(), served(chat_template="chatml")
    base = by_adapter.base.renderer
    assert by_adapter.of(["old"]) is by_adapter.of([]) is by_adapter.of(["gone"]) is by_adapter.base
    own = by_adapter.of(["own"]).renderer
    assert own.prompt("a") == base.prompt([user("a")], template_kwargs={"enable_thinking": False})
    assert by_adapter.of(["plain"]) is by_adapter.of(["plain", "same"])
    assert (
        by_adapter.of(["plain"]).renderer.prompt([user("<eos>")]).count(tokenizer.eos_token_id) == 0
    )
    with pytest.raises(APIError, match="different chat templates"):
        by_adapter.of(["own", "plain"])
    assert fixed.of(["own", "plain"]) is fixed.base

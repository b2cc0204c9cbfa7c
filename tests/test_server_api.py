"""What clients send: the table of parameters, errors in words, tool calls, reasoning."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from afina.data.renderer import Renderer
from afina.engine.grammar import GrammarCompiler
from afina.errors import AdapterError
from afina.server.output_parser import CallParser, ReasoningSplitter
from afina.server.parameters import PARAMETERS, parameters_page
from afina.server.prompts import ChatPrompts
from afina.server.response_input import ResponseRequest, messages_of
from afina.server.schemas import ChatCompletionRequest, CompletionRequest, EmbeddingRequest
from afina.server.startup import AdapterFolders
from afina.server.state import ResolvedModel
from afina.server.tool_format import FALLBACK, PROBE_ID
from afina.server.tools import close_objects
from afina.server.validation import describe_errors

BODIES: dict[str, Any] = {
    "/v1/chat/completions": (
        ChatCompletionRequest,
        chat_create_params.CompletionCreateParamsStreaming,
    ),
    "/v1/completions": (
        CompletionRequest,
        completion_create_params.CompletionCreateParamsStreaming,
    ),
    "/v1/embeddings": (EmbeddingRequest, embedding_create_params.EmbeddingCreateParams),
    "/v1/responses": (ResponseRequest, response_create_params.ResponseCreateParamsStreaming),
}


@pytest.mark.parametrize("endpoint", BODIES)
def test_each_parameter_of_openai_has_a_line_in_the_table(endpoint: str) -> None:
    body, theirs = BODIES[endpoint]
    table = PARAMETERS[endpoint]
    assert set(get_type_hints(theirs)) <= set(table)
    used = {name for name, rule in table.items() if rule.handling == "used"}
    assert used == set(body.model_fields)


def test_the_page_of_parameters_is_that_of_the_code() -> None:
    page = Path(__file__).parents[1] / "docs" / "parameters.md"
    assert page.read_text() == parameters_page(), "make parameters"


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def error_of(body: Any, kind: Any = ChatCompletionRequest) -> tuple[str, str]:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(body)
    errors = [{**e, "loc": ("body", *e["loc"])} for e in caught.value.errors()]
    return describe_errors(errors, body)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("hi", "messages"),
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([user(3)], "messages[0].content"),
        ([user("a"), user(None)], "messages[1].content"),
        ([user([{"type": "image_url", "image_url": {}}])], "messages[0].content[0].type"),
        ([user([{"type": "text", "text": 1}])], "messages[0].content[0].text"),
        ([user("a", nam="b")], "messages[0].nam"),
        ([{"role": "robot", "content": "a"}], "messages[0].role"),
        ([{"content": "a"}], "messages[0].role"),
        ([{"role": "tool", "content": "a"}], "messages[0].tool_call_id"),
        ([user("a", tool_calls=[{"function": {"name": "f"}}])], "messages[0].tool_calls"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "c", "function": {}}]}],
            "messages[0].tool_calls[0].function.name",
        ),
    ],
)
def test_an_invalid_message_is_named_by_its_place(messages: Any, param: str) -> None:
    message, named = error_of({"messages": messages})
    assert named == param
    assert not re.search(r"\b(str|int|dict|union|Input should|valid (string|list))\b", message)


@pytest.mark.parametrize(
    ("values", "param", "words"),
    [
        ({"n": True}, "n", "an integer"),
        ({"n": "2"}, "n", "found the text '2'"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"temperature": 3}, "temperature", "at most 2"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"stop": 3}, "stop", "a text or a list"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "'json_schema'"),
        ({"audio": {"voice": "a"}}, "audio", "only text"),
        ({"tools": [{"type": "mcp"}]}, "tools[0].type", "'mcp'"),
        ({"logit_bias": {"5": 200}}, "logit_bias.5", "at most 100"),
        ({"guided_json": "{"}, "guided_json", "JSON schema"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex", "use json"),
    ],
)
def test_an_invalid_parameter_is_named_in_words(
    values: dict[str, Any], param: str, words: str
) -> None:
    message, named = error_of({"messages": [user("a")], **values})
    assert named == param and words in message


def test_a_body_that_is_no_object() -> None:
    assert "JSON object" in error_of([1])[0]
    assert error_of({"prompt": [[1], "a"]}, CompletionRequest)[1].startswith("prompt")


@pytest.mark.parametrize("endpoint", BODIES)
def test_null_is_like_leaving_out(endpoint: str) -> None:
    body, _ = BODIES[endpoint]
    required = {"messages": [user("a")], "prompt": "a", "input": "a"}
    own = {name: required[name] for name in required if name in body.model_fields}
    nulls = {name: None for name in PARAMETERS[endpoint] if name not in own}
    assert body.model_validate({**own, **nulls}).ignored == ()


# ---- calls and thoughts in the text of an answer

ARGUMENTS = '{"city": "Li}m\\"a{", "days": [1, {"x": 2}]}'
CALL = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
NOW = '{"name": "now", "arguments": {}}'
WEATHER = [("weather", ARGUMENTS)]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"Well.\n<tool_call>\n{CALL}\n</tool_call>", "Well.", WEATHER),
        (
            f"<tool_call>{CALL}</tool_call>\n<tool_call>{NOW}</tool_call>",
            "",
            [*WEATHER, ("now", "{}")],
        ),
        (f'[TOOL_CALLS][{CALL}, {NOW[:-1]}, "id": "a"}}]', "", [*WEATHER, ("now", "{}")]),
        (CALL.replace("arguments", "parameters"), "", WEATHER),
        (f"{CALL}; {NOW}", "", [*WEATHER, ("now", "{}")]),
        (f"[{CALL}]", "", WEATHER),
        (f'<tool_call>{{"arguments": {ARGUMENTS}, "name": "weather"}}</tool_call>', "", WEATHER),
        ('<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', "", [("now", "{}")]),
        ("<tool_call>" + NOW.replace("now", "rm") + "</tool_call>", None, []),
        (f"<tool_call>{NOW}</tool_call> More words.", "More words.", [("now", "{}")]),
        ('{"a": 1} is JSON', None, []),
        ("[1, 2] a < b {c} \n d ", None, []),
        (f"<tool_call>{CALL[:50]}", "", [("weather", CALL[33:50])]),
    ],
)
def test_calls_are_found_in_every_form_and_in_any_pieces(
    text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    for size in (1, 7, 10_000):
        parser = CallParser(["weather", "now"])
        deltas = [d for n in range(0, len(text), size) for d in parser.add(text[n : n + size])]
        deltas += parser.end()
        found = [d.text for d in deltas if d.kind == "call"]
        given = [
            "".join(d.text for d in deltas if d.kind == "arguments" and d.index == n)
            for n in range(len(found))
        ]
        assert list(zip(found, given, strict=True)) == calls
        said = "".join(d.text for d in deltas if d.kind == "content")
        assert said == (text if content is None else content)


@pytest.mark.parametrize(
    ("is_open", "text", "thought", "rest"),
    [
        (False, "<think>\na thought\n</think>\n\nhello", "a thought", "hello"),
        (True, "a thought</think>hello <think>", "a thought", "hello <think>"),
        (False, "hello <think>a</think>", "", "hello <think>a</think>"),
        (False, "<th", "", "<th"),
        (True, "cut", "cut", ""),
    ],
)
def test_a_thought_is_split_from_the_answer(
    is_open: bool, text: str, thought: str, rest: str
) -> None:
    for size in (1, 3, 100):
        splitter = ReasoningSplitter("<think>", "</think>", is_open)
        pieces = [p for n in range(0, len(text), size) for p in splitter.add(text[n : n + size])]
        pieces += splitter.end()
        assert "".join(piece for is_thought, piece in pieces if is_thought) == thought
        assert "".join(piece for is_thought, piece in pieces if not is_thought) == rest


# ---- the form of calls, from the template

HERMES = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ '<s>' + m.role + '\\n' }}{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    '{{ \'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}{{ eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\\n' }}OPEN{% endif %}"
)
ONE_CALL = (
    "{% for m in messages %}{{ '<s>' + m.role }}{% if loop.first and tools %}{{ tools | tojson }}"
    "{% endif %}{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call') }}{% endif %}{% set c = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + c.name + '\", \"parameters\": ' }}{{ c.arguments | tojson }}{{ '}' }}"
    "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant{% endif %}"
)
WITH_IDS = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% elif m.tool_calls %}[TOOL_CALLS][{% for c in "
    "m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
    '{{ (c.function | tojson)[:-1] }}, "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}'
    "{% endfor %}]{{ eos_token }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
NAMED = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% elif m.tool_calls %}{% for c in m.tool_calls %}"
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
WITHOUT = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "hermes": HERMES.replace("OPEN", ""),
    "reasoning": HERMES.replace("OPEN", "{{ '<think>\\n' }}") + "{# </think> #}",
    "one call": ONE_CALL,
    "ids": WITH_IDS,
    "named": NAMED,
    "chatml": None,
    "none": WITHOUT,
}
TOOL_BODY: dict[str, Any] = {
    "messages": [user("Weather?")],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"enum": ["Lima"]}},
                    "required": ["city"],
                    "additionalProperties": False,
                },
            },
        },
        {"type": "function", "function": {"name": "now"}},
    ],
    "tool_choice": "required",
}


def renderer_of(name: str, tokenizer: Any, folder: Any) -> Renderer:
    template = None
    if TEMPLATES[name] is not None:
        template = str(folder / "t.jinja")
        (folder / "t.jinja").write_text(TEMPLATES[name])
    return Renderer(tokenizer, template or "chatml", 2048)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_required_call_has_the_form_of_the_template(
    name: str, tokenizer: Any, tmp_path: Any
) -> None:
    renderer = renderer_of(name, tokenizer, tmp_path)
    prompts = ChatPrompts(renderer)
    prompt = prompts.build(ChatCompletionRequest.model_validate(TOOL_BODY))
    form = prompts.format
    assert form.is_native == (name != "none") and form.has_ids == (name == "ids")
    assert (form == FALLBACK) == (name == "none")
    assert "weather" in tokenizer.decode(prompt.tokens)
    text = form.begin + "weather" + form.between + '{"city": "Lima"}'
    if form.middle:
        text += form.middle + "now" + form.between + "{}"
    text = (text + form.end).replace(PROBE_ID, "abcdefghi")
    text = "so</think>\n\n" + text if prompt.is_thought_open else text
    matcher = GrammarCompiler(tokenizer).of(prompt.grammar, renderer.stop_token_ids)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        assert matcher.allowed_tokens(len(tokenizer))[token], tokenizer.decode([token])
        matcher.accept_token(token)
    parser = prompt.parser()
    deltas = parser.add(text) + parser.end()
    calls = [d.text for d in deltas if d.kind == "call"]
    assert calls == (["weather", "now"] if form.middle else ["weather"])
    arguments = "".join(d.text for d in deltas if d.kind == "arguments" and d.index == 0)
    assert json.loads(arguments) == {"city": "Lima"}
    assert not [d for d in deltas if d.kind == "content"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_strict_arguments_are_followed_once_the_model_opens_a_call(
    name: str, tokenizer: Any, tmp_path: Any
) -> None:
    renderer = renderer_of(name, tokenizer, tmp_path)
    prompts = ChatPrompts(renderer)
    body = {**TOOL_BODY, "tool_choice": "auto"}
    weather, now = TOOL_BODY["tools"]
    strict = {**weather, "function": {**weather["function"], "strict": True}}
    free = prompts.build(ChatCompletionRequest.model_validate(body))
    assert free.grammar is None and free.json_schema is None
    prompt = prompts.build(ChatCompletionRequest.model_validate({**body, "tools": [strict, now]}))
    form, compiler = prompts.format, GrammarCompiler(tokenizer)
    begin = form.begin.lstrip().replace(PROBE_ID, "abcdefghi")
    end = form.end.replace(PROBE_ID, "abcdefghi")
    before = "Let me see. " if form.marker else ""
    thought = "so</think>\n\n" if prompt.is_thought_open else ""

    def follows(text: str) -> bool:
        matcher = compiler.of(prompt.grammar or "", renderer.stop_token_ids)
        for token in tokenizer(thought + text, add_special_tokens=False)["input_ids"]:
            if not matcher.allowed_tokens(len(tokenizer))[token]:
                return False
            matcher.accept_token(token)
        return bool(matcher.allowed_tokens(len(tokenizer))[min(renderer.stop_token_ids)])

    call = before + begin + "weather" + form.between
    assert follows("It is sunny, {as} ever.") and follows("")
    assert follows(call + '{"city": "Lima"}' + end)
    assert follows(before + begin + "now" + form.between + '{"zone": [1, 2]}' + end)
    assert not follows(call + '{"city": "Oslo"}' + end)
    assert not follows(call + "{}" + end)
    assert not follows(before + begin + "other" + form.between + "{}" + end)


def test_history_with_calls_is_rendered_as_calls_are_generated(
    tokenizer: Any, tmp_path: Any
) -> None:
    call = {"id": "call_1", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
    history = [
        user("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    for name, template in TEMPLATES.items():
        (tmp_path / "t.jinja").write_text(template or "")
        chosen = str(tmp_path / "t.jinja") if template else "chatml"
        renderer = Renderer(tokenizer, chosen, 2048)
        prompts = ChatPrompts(renderer)
        body = {**TOOL_BODY, "messages": history, "tool_choice": "auto"}
        prompt = prompts.build(ChatCompletionRequest.model_validate(body))
        form, text = prompts.format, tokenizer.decode(prompt.tokens)
        written = f'{form.begin}weather{form.between}{{"city": "Lima"}}'
        assert written in text, name
        assert "sunny" in text and prompt.grammar is None


def test_a_template_gets_its_own_variables_only(tokenizer: Any, tmp_path: Any) -> None:
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
        "{% if enable_thinking %}{{ 'thinking' }}{% endif %}"
    )
    prompts = ChatPrompts(Renderer(tokenizer, str(tmp_path / "t.jinja"), 2048))

    def text(**more: Any) -> str:
        body = ChatCompletionRequest.model_validate({"messages": [user("hi")], **more})
        return str(tokenizer.decode(prompts.build(body).tokens))

    assert "thinking" in text(chat_template_kwargs={"enable_thinking": True})
    assert "thinking" in text(reasoning_effort="high")
    assert "thinking" not in text(reasoning_effort="none")
    with pytest.raises(Exception, match="did you mean 'enable_thinking'"):
        text(chat_template_kwargs={"enable_thinkng": True})


def test_the_last_message_is_continued(tokenizer: Any) -> None:
    prompts = ChatPrompts(Renderer(tokenizer, "chatml", 2048))
    messages = [user("hi"), {"role": "assistant", "content": "the sol"}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    tokens = prompts.build(ChatCompletionRequest.model_validate(body)).tokens
    assert str(tokenizer.decode(tokens)).endswith("assistant\nthe sol")
    assert error_of({**body, "messages": messages[:1]})[1] == "continue_final_message"


def test_items_of_a_response_are_the_messages_of_a_chat() -> None:
    items: list[Any] = [
        user([{"type": "input_text", "text": "Weather?"}]),
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "id": "fc"},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "fine"}], "id": "m"},
    ]
    messages = messages_of(items, "be brief")
    roles = ["system", "user", "assistant", "tool", "assistant"]
    assert [message["role"] for message in messages] == roles
    assert messages[2]["reasoning_content"] == "hm"
    assert [call["id"] for call in messages[2]["tool_calls"]] == ["c1", "c2"]
    assert messages[4]["content"] == "fine"


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"previous_response_id": "r"}, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "i"}]}, "input[0].type"),
        ({"input": [user([{"type": "input_image"}])]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"include": ["file"]}, "include[0]"),
        ({"truncation": "auto"}, "truncation"),
        ({"temperature": 5.0}, "temperature"),
    ],
)
def test_an_invalid_response_is_named_by_its_place(values: dict[str, Any], param: str) -> None:
    body = {"input": "hi", **values}
    try:
        request = ResponseRequest.model_validate(body)
    except ValidationError:
        assert error_of(body, ResponseRequest)[1] == param
    else:
        with pytest.raises(PydanticCustomError) as caught:
            request.chat()
        assert (caught.value.context or {})["param"] == param


def test_objects_have_their_declared_properties_only() -> None:
    inner = {"type": "object", "properties": {"a": {"type": "integer"}}}
    closed = close_objects(
        {"properties": {"b": inner, "c": {"items": inner}}, "$defs": {"d": inner}}
    )
    assert closed["additionalProperties"] is False
    for one in (
        closed["properties"]["b"],
        closed["properties"]["c"]["items"],
        closed["$defs"]["d"],
    ):
        assert one["additionalProperties"] is False
    for schema in (
        {"properties": {}, "additionalProperties": True},
        {"properties": {}, "anyOf": [inner]},
        {"allOf": [inner, {"properties": {"z": {}}}]},
        {"type": "object"},
    ):
        assert close_objects(schema) == schema


# ---- folders of adapters


class Registry:
    """A registry whose adapters are words in files; `bad` is damaged."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}

    def get(self, name: str) -> str | None:
        return self.words.get(name)

    def add(self, name: str, folder: Path, owner: str | None = None) -> None:
        word = (folder / "adapter_model.safetensors").read_text()
        if word == "bad":
            raise AdapterError("the file is damaged")
        self.words[name] = word

    replace = add


def test_folders_are_served_once_they_can_be(tmp_path: Path) -> None:
    def put(name: str, word: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
        (tmp_path / name / "adapter_model.safetensors").write_text(word)

    registry, unserved = Registry(), {}
    state: Any = SimpleNamespace(
        unserved=unserved,
        retry_adapter=None,
        store=SimpleNamespace(query=lambda table: []),
        settings=SimpleNamespace(adapters=[tmp_path, tmp_path / "missing"]),
        engine=SimpleNamespace(registry=registry),
    )
    put("good", "one")
    put("later", "bad")
    folders = AdapterFolders(state)
    folders.register_all()
    assert registry.words == {"good": "one"}
    assert unserved["later"].reason == "the file is damaged"
    assert not state.retry_adapter("later")  # nothing has changed
    put("later", "whole")
    assert state.retry_adapter("later") and not unserved
    put("new", "three")
    put("good", "one, changed")
    folders.scan()
    assert "new" not in registry.words  # it may still be written
    folders.scan()
    assert registry.words == {"good": "one, changed", "later": "whole", "new": "three"}
    put("good", "bad")
    for _ in range(3):
        folders.scan()
    assert registry.words["good"] == "one, changed"


def test_a_routed_name_fits_a_header() -> None:
    found = ResolvedModel("modèle-😀", choice={"adapter": None, "score": 0.5, "why": "none"})
    assert all(value.isascii() for value in found.headers.values())
    assert found.headers["x-afina-adapter"].startswith("mod%C3%A8le")

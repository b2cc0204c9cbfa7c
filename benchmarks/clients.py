"""Stock clients against a running server, each with its defaults: python clients.py URL MODEL NAME.

The clients are installed apart from afina, by `make clients` (.venv-clients). Each function below
is one client; it raises where the client or its answer fails.
"""

import asyncio
import io
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

QUESTION = "What is the weather in Lima?"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Lima", "Cusco"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather of a city.", "parameters": SCHEMA},
}


def openai_chat(url: str, model: str) -> None:
    """Plain, streamed, forced and returned calls, structured output."""
    import openai
    from pydantic import BaseModel

    class City(BaseModel):
        city: Literal["Lima", "Cusco"]

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    plain = client.chat.completions.create(model=model, messages=messages, max_tokens=8)
    assert plain.usage is not None
    assert plain.usage.completion_tokens <= 8
    forced = {"type": "function", "function": {"name": "weather"}}
    options: Any = {"tools": [TOOL], "tool_choice": forced, "max_tokens": 80}
    for seed in range(10):
        got = client.chat.completions.create(model=model, messages=messages, seed=seed, **options)
        (call,) = got.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Lima", "Cusco")
        assert got.choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(model=model, messages=messages, **options) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    history = [
        *messages,
        final.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    for choice in ("none", "auto"):
        client.chat.completions.create(
            model=model, messages=history, tools=[TOOL], tool_choice=choice, max_tokens=8
        )
    parsed = client.chat.completions.parse(
        model=model, messages=messages, response_format=City, max_tokens=60, seed=0
    )
    assert isinstance(parsed.choices[0].message.parsed, City)


def openai_responses(url: str, model: str) -> None:
    """Responses: text, stream, calls with their outputs, structured output."""
    import openai
    from pydantic import BaseModel

    class City(BaseModel):
        city: Literal["Lima", "Cusco"]

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    tool: Any = {"type": "function", **TOOL["function"], "strict": True}
    got = client.responses.create(model=model, input=QUESTION, max_output_tokens=8)
    assert got.output_text
    assert got.usage is not None
    called = client.responses.create(
        model=model, input=QUESTION, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = [item for item in called.output if item.type == "function_call"]
    items: list[Any] = [{"role": "user", "content": QUESTION}, *called.output]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    client.responses.create(model=model, input=items, tools=[tool], max_output_tokens=8)
    with client.responses.stream(model=model, input=QUESTION, max_output_tokens=8) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds
    parsed = client.responses.parse(model=model, input=QUESTION, text_format=City)
    assert isinstance(parsed.output_parsed, City)


def openai_batches(url: str, model: str) -> None:
    """A batch of chats, until its output file is there."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n in range(3)
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("b.jsonl", io.BytesIO(data)), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    until = time.monotonic() + 60
    while client.batches.retrieve(batch.id).status not in ("completed", "failed"):
        assert time.monotonic() < until
        time.sleep(0.2)
    batch = client.batches.retrieve(batch.id)
    assert batch.request_counts is not None, batch
    assert batch.request_counts.completed == 3, batch
    output = client.files.content(batch.output_file_id or "").text.splitlines()
    assert sorted(json.loads(line)["custom_id"] for line in output) == ["0", "1", "2"]


def langchain(url: str, model: str) -> None:
    """Chat, stream, bound tools, structured output, embeddings."""
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings
    from pydantic import BaseModel

    class City(BaseModel):
        """A city."""

        city: Literal["Lima", "Cusco"]

    chat = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="none", max_tokens=400)
    assert chat.invoke(QUESTION).content is not None
    assert list(chat.stream(QUESTION))
    bound = chat.bind_tools([City], tool_choice="any")
    assert bound.invoke(QUESTION).tool_calls[0]["name"] == "City"
    for method in ("json_schema", "function_calling"):
        structured = chat.with_structured_output(City, method=method)
        assert isinstance(structured.invoke(QUESTION), City)
    vectors = OpenAIEmbeddings(model=model, base_url=f"{url}/v1", api_key="none")
    vectors.check_embedding_ctx_length = False  # its token numbers are those of OpenAI's tokenizer
    assert len(vectors.embed_documents(["the sol", "the luna"])) == 2


def instructor(url: str, model: str) -> None:
    """Structured output by tools and by JSON schema."""
    import instructor
    import openai
    from pydantic import BaseModel

    class City(BaseModel):
        city: Literal["Lima", "Cusco"]

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), mode=mode
        )
        got = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            response_model=City,
            max_tokens=600,
            max_retries=0,
        )
        assert isinstance(got, City)


def pydantic_ai(url: str, model: str) -> None:
    """An agent with a typed result."""
    from pydantic import BaseModel
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class City(BaseModel):
        city: Literal["Lima", "Cusco"]

    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    agent = Agent(OpenAIChatModel(model, provider=provider), output_type=City)
    assert agent.run_sync(QUESTION).output.city in ("Lima", "Cusco")


def openai_agents(url: str, model: str) -> None:
    """An agent with a tool, by chats and by responses."""
    import openai
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )

    set_tracing_disabled(True)
    asked = []

    @function_tool
    def weather(city: Literal["Lima", "Cusco"]) -> str:
        """Return the weather of a city."""
        asked.append(city)
        return "sunny"

    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        asked.clear()
        agent = Agent(
            name="guide",
            instructions="Use the tool.",
            model=kind(model=model, openai_client=client),
            tools=[weather],
            model_settings=ModelSettings(tool_choice="required", max_tokens=400),
        )
        result = asyncio.run(Runner.run(agent, QUESTION))
        assert asked
        assert result.final_output is not None


def litellm(url: str, model: str) -> None:
    """Chat, stream, tools, text completion and embedding."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    options = {"api_base": f"{url}/v1", "api_key": "none", "model": f"openai/{model}"}
    messages = [{"role": "user", "content": QUESTION}]
    assert litellm.completion(messages=messages, max_tokens=8, **options).choices
    assert list(litellm.completion(messages=messages, max_tokens=8, stream=True, **options))
    got = litellm.completion(
        messages=messages, tools=[TOOL], tool_choice="required", max_tokens=100, **options
    )
    assert got.choices[0].message.tool_calls[0].function.name == "weather"
    assert litellm.embedding(input=["the sol"], **options).data


def lm_eval(url: str, model: str) -> None:
    """lm-evaluation-harness' local-completions: scores of prompts, and generation."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    scorer = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model=model,
        tokenizer_backend="remote",
        tokenized_requests=False,
        max_length=512,
    )
    pairs = [("The sun is", " yellow."), ("The sun is", " a city in the sea.")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=n)
        for n, pair in enumerate(pairs)
    ]
    scores = scorer.loglikelihood(requests)
    assert all(score < 0 and isinstance(greedy, bool) for score, greedy in scores), scores


CLIENTS: dict[str, Callable[[str, str], None]] = {
    function.__name__: function
    for function in (
        openai_chat,
        openai_responses,
        openai_batches,
        langchain,
        instructor,
        pydantic_ai,
        openai_agents,
        litellm,
        lm_eval,
    )
}


def main() -> None:
    """Run the named clients, or all of them, and print the seconds of each."""
    url, model, *names = sys.argv[1:]
    for name in names or CLIENTS:
        begin = time.perf_counter()
        CLIENTS[name](url, model)
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()

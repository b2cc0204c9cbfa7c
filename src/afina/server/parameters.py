"""What the server does with each parameter of its requests: one table for code and documents.

used      it changes the response as documented
ignored   it changes nothing in the response (bookkeeping, hints); named in `x-afina-ignored`
rejected  it would change what the response means, and this server cannot do it: status 400

Validation (`schemas.py`) and the tables of docs/serving.md are generated from here, and a test
compares the names with the type definitions of OpenAI's own package.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Handling = Literal["used", "ignored", "rejected"]


@dataclass(frozen=True)
class Parameter:
    """Handling of one parameter.

    Attributes:
        why: what it does, or the reason for which it is ignored or rejected.
        no_ops: values of a rejected parameter that change nothing, and are therefore accepted.
    """

    handling: Handling
    why: str
    no_ops: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Return whether a value of a rejected parameter changes nothing."""
        return value is None or any(_is_equal(value, no_op) for no_op in self.no_ops)


def _is_equal(value: Any, other: Any) -> bool:
    """Compare as JSON does: true is not 1, and 1 is 1.0."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _used(**parameters: str) -> dict[str, Parameter]:
    return {name: Parameter("used", why) for name, why in parameters.items()}


def _ignored(**parameters: str) -> dict[str, Parameter]:
    return {name: Parameter("ignored", why) for name, why in parameters.items()}


def _rejected(**parameters: tuple[str, tuple[Any, ...]]) -> dict[str, Parameter]:
    return {name: Parameter("rejected", *rule) for name, rule in parameters.items()}


_MODEL = _used(model="the base, an adapter, a weighted sum (a:0.7,b:0.3) or auto")
_LOGGED = _used(
    user="identifies the end user in the log",
    safety_identifier="identifies the end user in the log",
)
_CACHE_HINTS = _ignored(
    prompt_cache_key="prefixes are cached by their content",
    prompt_cache_retention="the cache evicts by available memory only",
    prompt_cache_options="the cache evicts by available memory only",
)
_SAMPLING = (
    _MODEL
    | _LOGGED
    | _CACHE_HINTS
    | _used(
        n="number of completions, 1 to 16",
        stream="server-sent events while tokens are generated",
        stream_options="include_usage; include_obfuscation is ignored",
        stop="at most 16 strings that end the completion",
        seed="random seed; without it a random one",
        temperature="0 to 2; 0 takes the most probable token",
        top_p="nucleus sampling, above 0 to 1",
        presence_penalty="-2 to 2",
        frequency_penalty="-2 to 2",
        logit_bias="-100 to 100, added to the logits of token ids",
        top_k="tokens to sample from; 0 and -1 mean all (as in vLLM)",
        min_p="least probability relative to the most probable token (as in vLLM)",
        repetition_penalty="penalty of CTRL; 1 is none (as in vLLM)",
        ignore_eos="continue after the end of text, for measurements (as in vLLM)",
        min_tokens="stop tokens are not sampled before (as in vLLM)",
        stop_token_ids="token ids that end the completion (as in vLLM)",
        skip_special_tokens="false keeps special tokens in the text (as in vLLM)",
        guided_json="JSON schema of the completion (as in vLLM)",
        structured_outputs="an object with json: the JSON schema of the completion (as in vLLM)",
    )
    | _ignored(
        priority="queues are fair by key",
        request_id="the header x-request-id has the server's own",
        cache_prompt="prefixes are always cached",
        detokenize="the completion is text",
        spaces_between_special_tokens="the tokenizer decides",
    )
    | _rejected(
        guided_regex=("use guided_json or response_format", ()),
        guided_choice=("use guided_json with an enum", ()),
        guided_grammar=("use guided_json or response_format", ()),
        length_penalty=("beam search is not supported", (1.0,)),
        use_beam_search=("beam search is not supported", (False,)),
        early_stopping=("beam search is not supported", (False,)),
        typical_p=("typical sampling is not supported", (0.0, 1.0)),
        mirostat=("mirostat is not supported", (0,)),
        truncate_prompt_tokens=("prompts are never cut", ()),
        logits_processors=("logits processors are not supported", ([],)),
        bad_words=("use logit_bias", ([],)),
        include_stop_str_in_output=("the stop string is never part of the text", (False,)),
    )
)

CHAT = (
    _SAMPLING
    | _used(
        messages="roles system, developer, user, assistant, tool; text, calls and their results",
        max_tokens="the older name of max_completion_tokens; -1 is no limit",
        max_completion_tokens="most tokens of the completion; by default the rest of the context",
        logprobs="log-probabilities of the completion's tokens",
        top_logprobs="the most probable tokens at each position, 0 to 20",
        response_format="text, json_object, or json_schema (always followed exactly)",
        tools="functions that the model may call",
        tool_choice="auto, none, required, or one function; required is guaranteed by grammar",
        parallel_tool_calls="false: at most one call",
        reasoning_effort="passed to a chat template that has levels; otherwise ignored",
        chat_template_kwargs="variables of the chat template (as in vLLM)",
        continue_final_message="continue the last message, of the assistant (as in vLLM)",
        add_generation_prompt="false where continue_final_message is true (as in vLLM)",
        separate_reasoning="false leaves reasoning in content (as in SGLang)",
    )
    | _ignored(
        metadata="completions are not stored",
        service_tier="there is one service tier",
        prediction="it changes the speed only",
        verbosity="a hint for bases with levels",
    )
    | _rejected(
        store=("completions are not stored", (False,)),
        functions=("use tools", ([],)),
        function_call=("use tool_choice", ("none",)),
        audio=("only text is generated", ()),
        modalities=("only text is generated", (["text"],)),
        web_search_options=("web search is not supported", ()),
        moderation=("moderation is not supported", ()),
        chat_template=("the template is the server's: --chat-template", ()),
        documents=("use messages", ([],)),
        echo=("use /v1/completions", (False,)),
        prompt_logprobs=("use /v1/completions with echo", ()),
    )
)
COMPLETIONS = (
    _SAMPLING
    | _used(
        prompt="a text or token ids, or a list of them",
        max_tokens="most tokens of a completion, 16 by default; 0 with echo scores the prompt",
        logprobs="log-probabilities with the most probable tokens, 0 to 5",
        echo="the prompt before the completion, with its logprobs where they are requested",
        best_of="only equal to n, since all completions are returned",
        add_special_tokens="false leaves out the first (BOS) token of a text (as in vLLM)",
    )
    | _ignored(
        metadata="completions are not stored",
        service_tier="there is one service tier",
    )
    | _rejected(
        suffix=("filling in the middle is not supported", ("",)),
        store=("completions are not stored", (False,)),
        prompt_logprobs=("use echo with logprobs", ()),
    )
)
EMBEDDINGS = (
    _MODEL
    | _LOGGED
    | _used(
        input="a text or token ids of this base, or a list of them",
        encoding_format="float or base64",
        dimensions="only the size of the base's vectors",
    )
    | _ignored(priority="queues are fair by key", request_id="see x-request-id")
    | _rejected(
        input_type=("texts are embedded alike", ()),
        truncate_prompt_tokens=("inputs are never cut", ()),
    )
)
RESPONSES = (
    _MODEL
    | _LOGGED
    | _CACHE_HINTS
    | _used(
        input="a text, or items: messages, function_call, function_call_output, reasoning",
        instructions="text of the system, before the input",
        max_output_tokens="most tokens of the output; by default the rest of the context",
        temperature="0 to 2; 0 takes the most probable token",
        top_p="nucleus sampling, above 0 to 1",
        top_logprobs="the most probable tokens at each position, with include",
        seed="random seed; without it a random one",
        top_k="tokens to sample from; 0 and -1 mean all",
        min_p="least probability relative to the most probable token",
        repetition_penalty="penalty of CTRL; 1 is none",
        chat_template_kwargs="variables of the chat template",
        tools="functions that the model may call",
        tool_choice="auto, none, required, or one function; required is guaranteed by grammar",
        parallel_tool_calls="false: at most one call",
        text="format: text, json_object, or json_schema (always followed exactly)",
        reasoning="effort, for a chat template that has levels",
        include="message.output_text.logprobs; reasoning.encrypted_content is ignored",
        stream="server-sent events while tokens are generated",
        stream_options="include_obfuscation is ignored",
        metadata="returned with the response",
        truncation="only disabled: an input beyond the context is an error",
    )
    | _ignored(
        store="responses are never stored: store is false in the response",
        service_tier="there is one service tier",
        max_tool_calls="it limits built-in tools, and there are none",
    )
    | _rejected(
        previous_response_id=("responses are not stored: send the earlier items as input", ()),
        conversation=("conversations are not stored: send the earlier items as input", ()),
        background=("a response is generated while the client waits", (False,)),
        background_options=("a response is generated while the client waits", ()),
        context_management=("contexts are never compacted", ([],)),
        prompt=("stored prompts are not supported: use instructions and input", ()),
        moderation=("moderation is not supported", ()),
        access_programs=("there are no access programs", ()),
        image=("only text is generated", ()),
    )
)
_POOLING = (
    _LOGGED
    | _used(model="the base, or an adapter of it")
    | _ignored(
        priority="queues are fair by key",
        request_id="the header x-request-id has the server's own",
        encoding_format="numbers are JSON",
    )
    | _rejected(
        truncate_prompt_tokens=("texts are never cut", ()),
        dimensions=("there are no vectors in the response", ()),
    )
)
CLASSIFY = (
    _POOLING
    | _used(
        input="a text or token ids, a pair of two texts, or a list of them",
        use_activation="false returns the scores before softmax or sigmoid (as in vLLM)",
    )
    | _rejected(messages=("use input", ()))
)
RERANK = (
    _POOLING
    | _used(
        query="the text that documents are compared with",
        documents="texts, or objects with text",
        top_n="number of results, the highest first; by default all",
        return_documents="false leaves the documents out of the results (as in Jina's API)",
    )
    | _rejected(
        max_tokens_per_doc=("texts are never cut", ()),
        rank_fields=("the field is text", (["text"],)),
    )
)
PARAMETERS: dict[str, Mapping[str, Parameter]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/embeddings": EMBEDDINGS,
    "/v1/classify": CLASSIFY,
    "/v1/rerank": RERANK,
    "/v1/responses": RESPONSES,
}


HEADER = """# Parameters of requests

What the server does with each parameter. *Used* ones change the response. *Ignored* ones change
nothing, and the header `x-afina-ignored` names them. *Rejected* ones are an error that names them.
`null` is like leaving a parameter out.

Generated from `src/afina/server/parameters.py` by `make parameters`.
"""


def parameters_page() -> str:
    """Return docs/parameters.md: a table for each endpoint."""
    tables = [f"## {endpoint}\n\n{parameter_table(endpoint)}\n" for endpoint in PARAMETERS]
    return "\n".join([HEADER, *tables])


def parameter_table(endpoint: str) -> str:
    """Return the parameters of an endpoint as a Markdown table, sorted by handling and name."""
    order = ("used", "ignored", "rejected")
    rows = sorted(
        PARAMETERS[endpoint].items(), key=lambda item: (order.index(item[1].handling), item[0])
    )
    lines = ["| parameter | handling | |", "|---|---|---|"]
    for name, rule in rows:
        accepted = ", ".join(f"`{json.dumps(value)}`" for value in rule.no_ops)
        why = f"{rule.why}; accepted: {accepted}" if accepted else rule.why
        lines.append(f"| `{name}` | {rule.handling} | {why} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(parameters_page(), end="")

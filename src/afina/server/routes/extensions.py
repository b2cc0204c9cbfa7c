"""Endpoints with the names that other servers have: tokenize, health, and loading of adapters."""

import html
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, PlainTextResponse
from pydantic import Field, model_validator

import afina
from afina.server.auth import Principal, current_principal, require_admin
from afina.server.errors import not_found
from afina.server.parameters import PARAMETERS
from afina.server.routes.completions import check_token_ids, tokens_of
from afina.server.routes.models import (
    Folder,
    register_adapter,
    remove_adapter,
    replace_adapter,
    resolve_adapter_path,
)
from afina.server.schemas import ChatCompletionRequest, Model, StrictRequest, TokenId
from afina.server.state import get_state, requested_model
from afina.server.validation import invalid, validate

router = APIRouter()
Admin = Annotated[Principal, Depends(require_admin)]


class TokenizeRequest(StrictRequest):
    """POST /tokenize: a text, or the messages of a chat."""

    model: Model = ""
    prompt: str | None = None
    messages: list[Any] | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise invalid("prompt", "either prompt or messages is needed")
        return self

    @property
    def chat(self) -> ChatCompletionRequest:
        """The chat whose prompt is tokenized."""
        names = ("messages", "tools", "chat_template_kwargs", "continue_final_message")
        given = {name: getattr(self, name) for name in names}
        given["add_generation_prompt"] = not self.continue_final_message
        return validate(ChatCompletionRequest, given)


class DetokenizeRequest(StrictRequest):
    """POST /detokenize: token ids."""

    model: Model = ""
    tokens: list[TokenId] = Field(max_length=2**20)


class LoadRequest(StrictRequest):
    """POST /v1/load_lora_adapter, as in vLLM: the path is below a folder of --adapters."""

    lora_name: str
    lora_path: Folder
    load_inplace: bool = Field(False, description="replace an adapter of this name")


class UnloadRequest(StrictRequest):
    """POST /v1/unload_lora_adapter, as in vLLM."""

    lora_name: str
    lora_int_id: int | None = None


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Return the token ids of a text, or of a chat as its completion would begin."""
    state, caller = get_state(request), current_principal(request)
    names: tuple[str, ...] = ()
    if body.model:
        names = state.resolve_model(caller, requested_model(request, body.model)).names
    if body.prompt is not None and state.is_encoder:
        text, special = body.prompt, body.add_special_tokens
        encode = state.tokenizer
        options = {"add_special_tokens": special, "split_special_tokens": True}
        make = lambda: list(encode(text, **options)["input_ids"])  # noqa: E731
    elif body.prompt is not None:
        text = body.prompt
        special = body.add_special_tokens
        make = lambda: tokens_of(state, [text], special)[0] if text else []  # noqa: E731
    else:
        state.generator  # noqa: B018  # an encoder has no chats
        chat = body.chat
        make = lambda: state.formats.of(names).build(chat).tokens  # noqa: E731
    state.text_limit.check([body.prompt, body.messages, body.tools], "prompt")
    tokens = await state.run_in_tokenizer_thread(make)
    to_strings = state.tokenizer.convert_ids_to_tokens
    strings = to_strings(tokens) if body.return_token_strs else None
    return {
        "count": len(tokens),
        "max_model_len": state.model.max_positions,
        "tokens": tokens,
        "token_strs": strings,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    """Return the text of token ids, special tokens included."""
    state = get_state(request)
    check_token_ids(state, body.tokens, "tokens")
    tokens, decode = body.tokens, state.tokenizer.decode
    text = await state.run_in_tokenizer_thread(
        lambda: str(decode(tokens, skip_special_tokens=False))
    )
    return {"prompt": text}


@router.get("/tokenizer_info")
def tokenizer_info(request: Request) -> dict[str, Any]:
    """Return class, special tokens and chat template of the tokenizer, as in vLLM."""
    state = get_state(request)
    tokenizer = state.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "model_max_length": state.model.max_positions,
        **{name: getattr(tokenizer, name, None) for name in names},
        "chat_template": state.renderer.template.jinja,
    }


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
def load_lora_adapter(body: LoadRequest, request: Request, caller: Admin) -> str:
    """Register an adapter, or replace it with `load_inplace`."""
    state = get_state(request)
    folder = resolve_adapter_path(state, body.lora_path, "lora_path")
    if body.load_inplace and state.engine.registry.get(body.lora_name) is not None:
        replace_adapter(state, body.lora_name, folder, "lora_path")
    else:
        register_adapter(state, body.lora_name, folder, None, ("lora_name", "lora_path"))
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
def unload_lora_adapter(body: UnloadRequest, request: Request, caller: Admin) -> str:
    """Unregister an adapter; its files are kept."""
    state = get_state(request)
    if state.engine.registry.get(body.lora_name) is None:
        raise not_found("adapter", body.lora_name, "lora_name")
    remove_adapter(state, body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


@router.get("/")
def root() -> dict[str, str]:
    """Return what this server is, and where its description is."""
    return {
        "name": "afina",
        "version": afina.__version__,
        "description": "one frozen base and many adapters, by OpenAI's API",
        "api": "/v1",
        "docs": "/docs",
        "openapi": "/openapi.json",
        "health": "/healthz",
    }


@router.get("/docs", response_class=HTMLResponse)
def docs(request: Request) -> str:
    """Return a page of all paths and parameters; nothing is loaded from elsewhere."""
    paths: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
    rows = [
        f"<tr><td><code>{method.upper()} {html.escape(path)}</code></td>"
        f"<td>{html.escape(operation.get('description', ''))}</td></tr>"
        for path, methods in sorted(paths.items())
        for method, operation in methods.items()
    ]
    tables = [
        f"<h2><code>POST {endpoint}</code></h2><table>{''.join(_parameter_rows(endpoint))}</table>"
        for endpoint in PARAMETERS
    ]
    style = "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    style += "td{padding:.2em .8em .2em 0;vertical-align:top}"
    return (
        f"<!doctype html><title>afina</title><style>{style}</style>"
        f"<h1>afina {afina.__version__}</h1><p>The full description is in "
        f'<a href="/openapi.json">/openapi.json</a>.</p><table>{"".join(rows)}</table>'
        f"{''.join(tables)}"
    )


def _parameter_rows(endpoint: str) -> list[str]:
    return [
        f"<tr><td><code>{name}</code></td><td>{rule.handling}</td>"
        f"<td>{html.escape(rule.why)}</td></tr>"
        for name, rule in PARAMETERS[endpoint].items()
    ]

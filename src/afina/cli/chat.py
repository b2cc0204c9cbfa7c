"""`afina chat`: a conversation in the terminal, answers appearing as they are made."""

import re
import sys
from typing import Any

from rich.console import Console

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import load_run
from afina.data.renderer import Renderer
from afina.engine.detokenizer import Detokenizer
from afina.engine.request import SamplingParams
from afina.errors import DataError
from afina.evaluation.generate import generate_tokens, stop_token_ids
from afina.models.causal_lm import CausalLM
from afina.settings import ChatSettings


def chat(settings: ChatSettings) -> dict[str, Any]:
    """Talk until the input ends, here or with a server; `/off` and `/on` switch the adapter, `/new` forgets what was said."""
    if settings.base_url is not None:
        from afina.cli.talk import talk

        return talk(settings)
    console = Console(stderr=True)
    opened = load_run(settings.adapter, settings)
    base, adapted = opened.causal_lm, opened.active
    route = adapted
    renderer = Renderer(base.tokenizer, opened.template, base.max_positions)
    sampling = SamplingParams(
        settings.max_new_tokens, settings.temperature, settings.top_p, seed=settings.seed
    )
    opening = (
        [{"role": "system", "content": settings.system_prompt}] if settings.system_prompt else []
    )
    messages = list(opening)
    who = f"{base.name} with {settings.adapter}" if settings.adapter else base.name
    console.print(
        f"{who}. /on and /off switch the adapter, /new starts again, Ctrl-D leaves.",
        highlight=False,
    )
    while (line := read_line()) is not None:
        if line in ("/on", "/off"):
            route = adapted if line == "/on" else None
        elif line == "/new":
            messages = list(opening)
        elif re.fullmatch(r"/[a-z]+", line):
            console.print(f"{line} is none of /on, /off, /new", highlight=False)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                prompt = renderer.prompt(messages)
                messages.append(
                    {
                        "role": "assistant",
                        "content": _answer(base, renderer, prompt, sampling, route),
                    }
                )
            except DataError as error:  # the conversation has outgrown the context
                console.print(f"{error.what}; /new starts again", highlight=False)
                messages.pop()
    return {
        "base": base.name,
        "run": str(settings.adapter) if settings.adapter else None,
        "messages": messages,
    }


def read_line() -> str | None:
    """What the person typed; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(
    base: CausalLM,
    renderer: Renderer,
    prompt: list[int],
    sampling: SamplingParams,
    route: ActiveAdapters | None,
) -> str:
    """Generate one answer, writing it out as it comes."""
    text, written = Detokenizer(base.tokenizer), ""
    stops = stop_token_ids(base) | renderer.stop_token_ids

    def write(piece: str) -> None:
        nonlocal written
        written += piece
        sys.stdout.write(piece)
        sys.stdout.flush()

    def say(_: int, token: int) -> None:
        if token not in stops:
            write(text.add(token))

    generate_tokens(base, [prompt], sampling, route, say, stops)
    write(text.end())
    print()
    return written.strip()

"""The object of /v1/responses and its events, from the pieces of an answer.

    response.created
      response.output_item.added       reasoning, message or function_call
        response.content_part.added
          response.output_text.delta   ...
        response.content_part.done
      response.output_item.done
    response.completed, .incomplete or .failed

The response without a stream is the last event's: there is one way to build it.
"""

import time
import uuid
from collections.abc import Iterator
from typing import Any

from afina.server.output_parser import Delta
from afina.server.response_input import ResponseRequest

Event = dict[str, Any]
PART_TYPES = {"reasoning": "reasoning_text", "message": "output_text"}


class ResponseBuilder:
    """One response while it is generated."""

    def __init__(self, body: ResponseRequest, model: str) -> None:
        self._number = -1
        self._item: Event | None = None  # the output item that is open
        self._kind = ""
        self._num_reasoning_tokens = 0
        self.response: Event = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": body.text.format or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [_tool(tool.model_dump()) for tool in body.tools],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def begin(self) -> Iterator[Event]:
        """Yield the first events."""
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=dict(self.response))

    def add(self, deltas: list[Delta], logprobs: list[Any], num_tokens: int) -> Iterator[Event]:
        """Yield the events of pieces.

        Args:
            logprobs: those of the step's tokens.
            num_tokens: tokens of the step.
        """
        if deltas and all(delta.kind == "reasoning" for delta in deltas):
            self._num_reasoning_tokens += num_tokens
        for delta in deltas:
            if delta.kind == "call":
                yield from self._close("completed")
                yield from self._open_call(delta.text)
            elif delta.kind == "arguments":
                assert self._item is not None
                self._item["arguments"] += delta.text
                yield self._delta("response.function_call_arguments.delta", delta.text)
            elif delta.text:
                kind = "reasoning" if delta.kind == "reasoning" else "message"
                if self._kind != kind:
                    yield from self._close("completed")
                    yield from self._open(kind)
                yield self._text_delta(delta.text, logprobs if kind == "message" else [])
                logprobs = []

    def end(self, finish: str, usage: Event) -> Iterator[Event]:
        """Yield the last events of a response whose engine's finish reason is `finish`."""
        status = "incomplete" if finish == "length" else "completed"
        if not self.response["output"] and self._item is None:  # an empty answer is a message too
            yield from self._open("message")
        yield from self._close(status)
        self.response["status"] = status
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["completed_at"] = int(time.time())
        self.response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {
                **usage["prompt_tokens_details"],
                "cache_write_tokens": 0,
            },
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }
        yield self._event(f"response.{status}", response=dict(self.response))

    def fail(self, message: str, code: str | None) -> Iterator[Event]:
        """Yield the events of an error after the stream has begun."""
        self.response["status"] = "failed"
        self.response["error"] = {"code": "server_error", "message": message}
        yield self._event("error", code=code, message=message, param=None)
        yield self._event("response.failed", response=dict(self.response))

    def _event(self, kind: str, /, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}

    @property
    def _position(self) -> Event:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self.response["output"])}

    def _delta(self, name: str, text: str, **fields: Any) -> Event:
        return self._event(name, **self._position, delta=text, **fields)

    def _open(self, kind: str) -> Iterator[Event]:
        part: Event = {"type": PART_TYPES[kind], "text": ""}
        item: Event = {"type": kind, "status": "in_progress", "content": []}
        if kind == "message":
            part |= {"annotations": [], "logprobs": []}
            item |= {"id": f"msg_{uuid.uuid4().hex}", "role": "assistant"}
        else:
            item |= {"id": f"rs_{uuid.uuid4().hex}", "summary": []}
        self._item, self._kind = item, kind
        yield self._added()
        item["content"] = [part]
        yield self._event(
            "response.content_part.added", **self._position, content_index=0, part=dict(part)
        )

    def _open_call(self, name: str) -> Iterator[Event]:
        number = uuid.uuid4().hex
        self._item, self._kind = (
            {
                "type": "function_call",
                "id": f"fc_{number}",
                "call_id": f"call_{number[:24]}",
                "name": name,
                "arguments": "",
                "status": "in_progress",
            },
            "call",
        )
        yield self._added()

    def _added(self) -> Event:
        assert self._item is not None
        index = len(self.response["output"])
        return self._event("response.output_item.added", output_index=index, item=dict(self._item))

    def _text_delta(self, text: str, logprobs: list[Any]) -> Event:
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += text
        if self._kind == "reasoning":
            return self._delta("response.reasoning_text.delta", text, content_index=0)
        part["logprobs"] += logprobs
        name = "response.output_text.delta"
        return self._delta(name, text, content_index=0, logprobs=logprobs)

    def _close(self, status: str) -> Iterator[Event]:
        """Yield the events that end the open item."""
        item, position = self._item, self._position if self._item is not None else {}
        if item is None:
            return
        item["status"] = status
        if self._kind == "call":
            name, arguments = item["name"], item["arguments"]
            event = "response.function_call_arguments.done"
            yield self._event(event, **position, name=name, arguments=arguments)
        else:
            part = item["content"][0]
            name = f"response.{PART_TYPES[self._kind]}.done"
            more = {"logprobs": part["logprobs"]} if self._kind == "message" else {}
            yield self._event(name, **position, content_index=0, text=part["text"], **more)
            yield self._event(
                "response.content_part.done", **position, content_index=0, part=dict(part)
            )
        index = position["output_index"]
        yield self._event("response.output_item.done", output_index=index, item=dict(item))
        self.response["output"].append(item)
        self._item, self._kind = None, ""


def _tool(tool: Event) -> Event:
    """Return a tool in the flat form of responses."""
    function = tool["function"]
    strict = True if function["strict"] is None else function["strict"]
    return {"type": "function", **function, "strict": strict}

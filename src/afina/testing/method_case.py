"""A method on a module of one kind, which the promises of `afina.testing.methods` run on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from afina.adapters.attach import Adapter, attach
from afina.adapters.base import AdapterLayer
from afina.adapters.registry import get_method
from afina.adapters.segments import NO_ADAPTERS, ForwardContext, Segments
from afina.io.adapter_config import AdapterConfig
from afina.models.nf4 import NF4Linear

NUM_TOKENS = 6


def tokens(width: int) -> Callable[[], Tensor]:
    """Return a maker of inputs (NUM_TOKENS, width)."""
    return lambda: torch.randn(NUM_TOKENS, width)


# module kind -> (the frozen module, an input of it): rows of a batch for convolutions, else tokens
MODULE_KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear-down": (lambda: nn.Linear(23, 6), tokens(23)),
    "linear-up": (lambda: nn.Linear(7, 20, bias=False), tokens(7)),
    "linear-square": (lambda: nn.Linear(11, 11), tokens(11)),
    "conv1d-gpt2": (lambda: Conv1D(13, 9), tokens(9)),
    "conv1d": (
        lambda: nn.Conv1d(3, 8, 3, stride=2, padding=1),
        lambda: torch.randn(NUM_TOKENS, 3, 9),
    ),
    "conv2d": (
        lambda: nn.Conv2d(2, 9, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        lambda: torch.randn(NUM_TOKENS, 2, 6, 5),
    ),
    "conv2d-same": (
        lambda: nn.Conv2d(4, 3, 3, padding="same", bias=False),
        lambda: torch.randn(NUM_TOKENS, 4, 4, 3),
    ),
    "embedding": (lambda: nn.Embedding(19, 10), lambda: torch.tensor([0, 18, 7, 7, 12, 3])),
    "nf4": (lambda: NF4Linear.from_linear(nn.Linear(70, 9)), tokens(70)),
}


@dataclass
class MethodCase:
    """A method on a module of one kind, at "layer" in a model of two modules."""

    method: str
    kind: str
    spec: dict[str, Any]
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        make, inputs = MODULE_KINDS[self.kind]
        model: Any = nn.Sequential()
        model.add_module("layer", make())
        model.add_module("after", nn.Tanh())
        self.model: Any = model.to(self.dtype).eval().requires_grad_(False)
        self.frozen: Any = self.model.layer
        x = inputs()
        self.x = x.to(self.dtype) if x.is_floating_point() else x
        self.board = ForwardContext()
        self.unit: Any = "row" if isinstance(self.frozen, nn.Conv1d | nn.Conv2d) else "token"
        self.before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.plain = self.run(NO_ADAPTERS)

    @property
    def replaces(self) -> bool:
        """Whether the method's output is its own."""
        return get_method(self.method).replaces_base

    def put(self, name: str = "a", noise: float = 0.1, seed: int = 0) -> Adapter:
        """Attach an adapter in eval mode, as initialized (`noise` 0) or with random parameters."""
        spec = AdapterConfig(self.method, ("layer",), **{"rank": 2, "alpha": 4.0, **self.spec})
        adapter = attach(self.model, self.board, name, spec, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
        adapter.train(False)
        return adapter

    def run(self, segments: Segments, grad: bool = False) -> Tensor:
        """Return the model's output with the adapters of `segments`."""
        with torch.set_grad_enabled(grad), self.board.use(segments):
            return self.model(self.x)

    def delta(self, adapter: Adapter) -> AdapterLayer:
        """Return the adapter's layer."""
        return adapter.layers["layer"]

    def to_float64(self, adapter: Adapter) -> Adapter:
        """Convert the adapter to float64 and return it."""
        self.delta(adapter).double()
        return adapter


@contextmanager
def raises(error: type[Exception], match: str = "") -> Iterator[None]:
    """Raise `AssertionError` unless the block raises `error` with `match` in its message."""
    message: str | None = None
    try:
        yield
    except error as caught:
        message = str(caught)
    assert message is not None, f"{error.__name__} was not raised"
    assert match in message, f"{match!r} is not in the message: {message}"

"""The C++ kernels: loaded where they could be built, chosen for tensors that they can take, entered in torch.library.

Each operation of this room is `torch.ops.afina.NAME`, so that autograd, compile and the profiler see it. On CPU tensors
in float32 or bfloat16 it runs the kernel; on all others, and where the kernels are missing, its reference in PyTorch.

`AFINA_ISA` forces an instruction set (avx512bf16, avx512, avx2, plain), or `reference`: PyTorch alone.
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from afina.errors import SettingsError, nearest

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in cpp/kernels.h
OPERATIONS = torch.library.Library("afina", "DEF")


class Kernels:
    """The C++ library, or its absence, which is told once."""

    def __init__(self) -> None:
        self.library: Any = None
        self.missing = ""
        try:
            self.library = importlib.import_module("afina.kernels._native")
        except ImportError as error:
            self.missing = str(error)
        if wanted := os.environ.get("AFINA_ISA"):
            self.use(wanted)

    @property
    def isas(self) -> list[str]:
        """What this machine can run, the best first."""
        return self.library.isas() if self.library else []

    @property
    def isa(self) -> str:
        """What runs: an instruction set, or "reference"."""
        return self.library.isa() if self.library else "reference"

    def use(self, isa: str) -> None:
        """Run the kernels in `isa`; raises `SettingsError` where the machine has none of that name."""
        if isa == "reference":
            self.library, self.missing = None, ""
        elif isa in self.isas:
            self.library.use(isa)
        else:
            known = [*self.isas, "reference"]
            raise SettingsError(f"no kernels for {isa!r} here", where="AFINA_ISA", why=f"there are: {', '.join(known)}",
                                hint=nearest(isa, known))  # fmt: skip

    def take(self, *tensors: Tensor | None) -> bool:
        """Whether the kernels can work on these: there, on the CPU, all of one dtype that they know."""
        first = tensors[0]
        assert first is not None
        if first.device.type != "cpu":
            return False
        if not self.library:
            if self.missing:
                print(f"afina: without C++ kernels, PyTorch's own operations run, slower ({self.missing})", file=sys.stderr)
                self.missing = ""
            return False
        return first.dtype in TYPES and all(t is None or t.dtype == first.dtype for t in tensors)

    def __getattr__(self, name: str) -> Callable[..., None]:
        """A function of the library, which gets the number of PyTorch's threads as its first argument."""
        function, threads = getattr(self.library, name), torch.get_num_threads

        def call(*arguments: Any) -> None:
            function(threads(), *arguments)

        self.__dict__[name] = call  # found without coming here from now on: decoding calls hundreds of them a token
        return call


kernels = Kernels()


def operation(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    keep: Callable[..., None] | None = None,
) -> Any:
    """Enter an operation in torch.library: `run` computes, `fake` gives shapes only; returns the callable.

    `backward(ctx, *grads)` gives the gradients, from what `keep(ctx, inputs, output)` kept.
    """
    name = schema.partition("(")[0]
    OPERATIONS.define(schema)
    OPERATIONS.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"afina::{name}", fake, lib=OPERATIONS)
    if backward is not None:
        torch.library.register_autograd(f"afina::{name}", backward, setup_context=keep, lib=OPERATIONS)
    return getattr(torch.ops.afina, name).default


def direct() -> bool:
    """Whether a kernel may be called past torch.library, which costs more than a small product: no gradients, no tracing."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def address(tensor: Tensor | None) -> int:
    """Where a tensor's numbers lie; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()

"""Which kernel runs: C++ on CPUs, Triton on CUDA, and the reference in PyTorch on all else; entered in torch.library.

Each operation of this room is `torch.ops.afina.NAME`, so that autograd, compile and the profiler see it. On CPU tensors
in float32 or bfloat16 it runs the C++ kernel; on CUDA tensors in up to 32 bits the function of the same name in
`afina.kernels.triton`, where it has one; on all others, and where kernels are missing, its reference.

`AFINA_ISA` forces an instruction set (avx512bf16, avx512, avx2, plain); or `reference`: PyTorch alone; or `triton`: the
Triton kernels on CPU tensors too, which takes its interpreter (TRITON_INTERPRET=1) and is for tests.
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from afina.errors import SettingsError, did_you_mean

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in cpp/kernels.h
OPERATIONS = torch.library.Library("afina", "DEF")


class KernelDispatcher:
    """The C++ library and the Triton kernels, or their absence, which is told once."""

    def __init__(self) -> None:
        self.library: Any = None
        self.missing = ""
        self.triton: tuple[str, ...] = ("cuda",)  # devices whose tensors the Triton kernels get
        try:
            self.library = importlib.import_module("afina.kernels._native")
        except ImportError as error:
            self.missing = str(error)
        if wanted := os.environ.get("AFINA_ISA"):
            self.set_isa(wanted)

    @property
    def available_isas(self) -> list[str]:
        """What this machine can run, the best first."""
        return self.library.isas() if self.library else []

    @property
    def isa(self) -> str:
        """What runs on the CPU: an instruction set, "triton" or "reference"."""
        if "cpu" in self.triton:
            return "triton"
        return self.library.isa() if self.library else "reference"

    def set_isa(self, isa: str) -> None:
        """Run the kernels in `isa`; raises `SettingsError` where the machine has none of that name."""
        self.triton = (
            ("cuda", "cpu") if isa == "triton" else () if isa == "reference" else ("cuda",)
        )
        if isa == "reference":
            self.library, self.missing = None, ""
        elif isa == "triton":
            return
        elif isa in self.available_isas:
            self.library.use(isa)
        else:
            known = [*self.available_isas, "reference", "triton"]
            raise SettingsError(
                f"no kernels for {isa!r} here",
                where="AFINA_ISA",
                why=f"there are: {', '.join(known)}",
                hint=did_you_mean(isa, known),
            )

    def uses_cpp(self, *tensors: Tensor) -> bool:
        """Whether C++ is what runs on these tensors, and not Triton."""
        return tensors[0].device.type not in self.triton and self.cpp_accepts(*tensors)

    def has_kernel(self, *tensors: Tensor) -> bool:
        """Whether any kernel, in C++ or Triton, will do the work."""
        return self.cpp_accepts(*tensors) or self.triton_ops(*tensors) is not None

    def triton_ops(self, *arguments: Any) -> Any:
        """The Triton kernels where they can work on these (tensors, lists of them, and other things), else None."""
        if arguments[0].device.type not in self.triton or any(map(_is_double, arguments)):
            return None
        try:
            return importlib.import_module("afina.kernels.triton")
        except ImportError as error:
            print(
                f"afina: without Triton, PyTorch's own operations run, slower ({error})",
                file=sys.stderr,
            )
            self.triton = ()
            return None

    def cpp_accepts(self, *tensors: Tensor | None) -> bool:
        """Whether the C++ kernels can work on these: there, on the CPU, all of one dtype that they know."""
        first = tensors[0]
        assert first is not None
        if first.device.type != "cpu":
            return False
        if not self.library:
            if self.missing:
                print(
                    f"afina: without C++ kernels, PyTorch's own operations run, slower ({self.missing})",
                    file=sys.stderr,
                )
                self.missing = ""
            return False
        return first.dtype in TYPES and all(t is None or t.dtype == first.dtype for t in tensors)

    def __getattr__(self, name: str) -> Callable[..., None]:
        """A function of the library, which gets the number of PyTorch's threads as its first argument."""
        function, threads = getattr(self.library, name), torch.get_num_threads

        def call(*arguments: Any) -> None:
            function(threads(), *arguments)

        self.__dict__[name] = (
            call  # found without coming here from now on: decoding calls hundreds of them a token
        )
        return call


def _is_double(value: Any) -> bool:
    tensors = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors)


kernels = KernelDispatcher()


def register_op(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    keep: Callable[..., None] | None = None,
) -> Any:
    """Enter an operation in torch.library: `run` computes, `fake` gives shapes only; returns the callable.

    Where nobody needs torch.library, the callable goes past it: that costs more than a small product (25 us a norm).
    `backward(ctx, *grads)` gives the gradients, from what `keep(ctx, inputs, output)` kept. Where the Triton kernels have
    a function of the operation's name and can take its arguments, that one runs in the place of `run`.
    """
    name = schema.partition("(")[0]

    def chosen(*arguments: Any) -> Any:
        if arguments[0].device.type in kernels.triton and (
            made := getattr(kernels.triton_ops(*arguments), name, None)
        ):
            with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
                return made(*arguments)
        return run(*arguments)

    OPERATIONS.define(schema)
    OPERATIONS.impl(name, chosen, "CompositeExplicitAutograd")
    torch.library.register_fake(f"afina::{name}", fake, lib=OPERATIONS)
    if backward is not None:
        torch.library.register_autograd(
            f"afina::{name}", backward, setup_context=keep, lib=OPERATIONS
        )
    entered = getattr(torch.ops.afina, name).default
    return lambda *arguments: chosen(*arguments) if bypasses_dispatcher() else entered(*arguments)


def bypasses_dispatcher() -> bool:
    """Whether a kernel may be called past torch.library, which costs more than a small product: no gradients, no tracing."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def data_pointer(tensor: Tensor | None) -> int:
    """Where a tensor's numbers lie; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()

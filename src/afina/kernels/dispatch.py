"""Kernel dispatch: C++ on CPUs, Triton on CUDA, the PyTorch reference elsewhere.

Each operation of this package is `torch.ops.afina.NAME`, so that autograd, torch.compile and the
profiler see it. On CPU tensors in float32 or bfloat16 it runs the C++ kernel; on CUDA tensors in up
to 32 bits the function of its name in `afina.kernels.triton`, where there is one; on others, and
where kernels are missing, its reference.

`AFINA_ISA` forces an instruction set (avx512bf16, avx512, avx2, plain), `reference` (PyTorch only),
or `triton` (the Triton kernels on CPU tensors too, for tests: it needs TRITON_INTERPRET=1).
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
    """The C++ library and the Triton kernels; a missing one is reported once."""

    def __init__(self) -> None:
        self.library: Any = None
        self.missing = ""
        self.triton: tuple[str, ...] = ("cuda",)  # devices on which the Triton kernels run
        try:
            self.library = importlib.import_module("afina.kernels._native")
        except ImportError as error:
            self.missing = str(error)
        if wanted := os.environ.get("AFINA_ISA"):
            self.set_isa(wanted)

    @property
    def available_isas(self) -> list[str]:
        """Instruction sets that this machine supports, the fastest first."""
        return self.library.isas() if self.library else []

    @property
    def isa(self) -> str:
        """What runs on the CPU: an instruction set, "triton" or "reference"."""
        if "cpu" in self.triton:
            return "triton"
        return self.library.isa() if self.library else "reference"

    def set_isa(self, isa: str) -> None:
        """Run the kernels in `isa`.

        Raises:
            SettingsError: the machine does not support it.
        """
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
                f"no kernels for {isa!r} on this machine",
                where="AFINA_ISA",
                why=f"available: {', '.join(known)}",
                hint=did_you_mean(isa, known),
            )

    def uses_cpp(self, *tensors: Tensor) -> bool:
        """Return whether C++ runs on these tensors, and not Triton."""
        return tensors[0].device.type not in self.triton and self.cpp_accepts(*tensors)

    def has_kernel(self, *tensors: Tensor) -> bool:
        """Return whether a kernel, in C++ or Triton, runs on these tensors."""
        return self.cpp_accepts(*tensors) or self.triton_ops(*tensors) is not None

    def triton_ops(self, *arguments: Any) -> Any:
        """Return the Triton kernels where they take these (lists of) tensors, else None."""
        if arguments[0].device.type not in self.triton or any(map(_is_double, arguments)):
            return None
        try:
            return importlib.import_module("afina.kernels.triton")
        except ImportError as error:
            print(
                f"afina: without Triton, slower PyTorch operations run ({error})",
                file=sys.stderr,
            )
            self.triton = ()
            return None

    def cpp_accepts(self, *tensors: Tensor | None) -> bool:
        """Return whether C++ kernels exist and take these: on the CPU, of one supported dtype."""
        first = tensors[0]
        assert first is not None
        if first.device.type != "cpu":
            return False
        if not self.library:
            if self.missing:
                print(
                    f"afina: without C++ kernels, slower PyTorch operations run ({self.missing})",
                    file=sys.stderr,
                )
                self.missing = ""
            return False
        return first.dtype in TYPES and all(t is None or t.dtype == first.dtype for t in tensors)

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a function of the library, called with PyTorch's thread count first."""
        function, threads = getattr(self.library, name), torch.get_num_threads

        def call(*arguments: Any) -> None:
            function(threads(), *arguments)

        self.__dict__[name] = (
            call  # later look-ups find it directly: decoding makes hundreds per token
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
    """Register an operation in torch.library.

    Args:
        schema: Its name and signature.
        run: Computes it, where no Triton kernel of its name takes the arguments.
        fake: Returns empty results of the right shapes.
        backward: `backward(ctx, *grads)` returns the gradients; None: not differentiable.
        keep: `keep(ctx, inputs, output)` saves what `backward` reads.

    Returns:
        The function to call. It bypasses torch.library where autograd and tracing do not need it:
        that costs more than a small product (25 us for a norm).
    """
    name = schema.partition("(")[0]

    def chosen(*arguments: Any) -> Any:
        if arguments[0].device.type in kernels.triton and (
            kernel := getattr(kernels.triton_ops(*arguments), name, None)
        ):
            with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
                return kernel(*arguments)
        return run(*arguments)

    OPERATIONS.define(schema)
    OPERATIONS.impl(name, chosen, "CompositeExplicitAutograd")
    torch.library.register_fake(f"afina::{name}", fake, lib=OPERATIONS)
    if backward is not None:
        torch.library.register_autograd(
            f"afina::{name}", backward, setup_context=keep, lib=OPERATIONS
        )
    registered = getattr(torch.ops.afina, name).default
    return lambda *arguments: (
        chosen(*arguments) if bypasses_dispatcher() else registered(*arguments)
    )


def bypasses_dispatcher() -> bool:
    """Return whether kernels are called without torch.library: no gradients, no tracing."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def data_pointer(tensor: Tensor | None) -> int:
    """Return the address of a tensor's data; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()

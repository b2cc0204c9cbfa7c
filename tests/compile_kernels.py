"""Compile every Triton kernel for sm_90 on a machine without a card, and print the kernels' names. Run by a test."""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Card:
    """What the compiler asks of a card."""

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    driver.set_active(Card())
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: object, **named: object) -> None:
        made = run(self, *arguments, **(named | {"warmup": True, "grid": (1,)}))
        assert made.asm["cubin"]
        print(self.fn.__name__)

    JITFunction.run = compile_only  # type: ignore[method-assign]
    from afina.kernels import nf4
    from afina.kernels import triton as gpu

    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.zeros(40, 256, dtype=dtype), torch.ones(256, dtype=dtype)
        gpu.rms_norm(x, weight, 1e-5)
        gpu.rms_norm_backward(x, x, weight, 1e-5)
        gpu.swiglu(x, x)
        gpu.swiglu_backward(x, x, x)
        gpu.rotary(x.view(40, 2, 128), x[:, :128], x[:, :128], True)
        held = nf4.quantize(torch.randn(64, 256))
        stored = held.codes, held.scales, held.superscales, held.offset, 256
        gpu.nf4_dequantize(*stored, dtype)
        gpu.nf4_encode(torch.randn(64, 256).to(dtype))
        for rows in (1, 20):
            gpu.nf4_linear(x[:rows], *stored, torch.zeros(64, dtype=dtype))
        table, weights = torch.tensor([[0, 30, 0], [3, 40, 1]]), torch.ones(2)
        a, bt = (
            [torch.zeros(r, 256, dtype=dtype) for r in (8, 40)],
            [torch.zeros(256, r, dtype=dtype).T for r in (8, 40)],
        )
        gpu.grouped_lora(x, x, table, weights, a, bt)
        gpu.grouped_lora_backward(x, x, table, weights, a, bt)
        query, kv, out = (
            torch.zeros(*shape, dtype=dtype)
            for shape in ((3, 8, 128), (9, 2, 2, 16, 128), (3, 8, 128))
        )
        tables = torch.zeros(3, 4, dtype=torch.int32)
        gpu.paged_attention(query, kv, (0, 1, 2, 3), (1, 2, 60), tables, out, 16, 0.1, None, 30.0)


main()

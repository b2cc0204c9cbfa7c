"""The operations of `afina.kernels` in Triton, for CUDA, with the same names and arguments.

Only `afina.kernels.dispatch` imports this package. Tests compare it with the references in Triton's
interpreter on a CPU and compile it for sm_90; `benchmarks/gpu_kernels.py` measures it on a GPU.
Products run on tensor cores in the dtype of their inputs (float32 for float32) and are summed in
float32.
"""

from afina.kernels.triton.elementwise import (
    rms_norm,
    rms_norm_backward,
    rotary,
    swiglu,
    swiglu_backward,
)
from afina.kernels.triton.lora import grouped_lora, grouped_lora_backward
from afina.kernels.triton.nf4 import nf4_dequantize, nf4_encode, nf4_linear
from afina.kernels.triton.paged_attention import paged_attention

__all__ = [
    "grouped_lora",
    "grouped_lora_backward",
    "nf4_dequantize",
    "nf4_encode",
    "nf4_linear",
    "paged_attention",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "swiglu",
    "swiglu_backward",
]

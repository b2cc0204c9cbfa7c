"""The operations of this room in Triton, for CUDA: each function has the name and the arguments of the operation it does.

`afina.kernels.dispatch` chooses them; nobody else imports this room. They are checked against the references in Triton's
interpreter on a CPU, and compiled for sm_90; `benchmarks/gpu_kernels.py` measures them where there is a card. Products
are made by the tensor cores in the dtype of their inputs, in float32 where these are float32, and added up in float32.
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

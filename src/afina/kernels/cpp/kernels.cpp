// Compiled once for each instruction set, with the flags that CMakeLists.txt gives it and its name in AFINA_ISA.
#include "adamw8.h"
#include "attention.h"
#include "attention_back.h"
#include "elementwise.h"
#include "lora.h"
#include "nf4.h"
#include "paged.h"
#include "product.h"
#include "mora.h"

namespace {

template <Task float32, Task bfloat16, class Job>
void typed(const void* args, i64 begin, i64 end) {
    (((const Job*)args)->type == kFloat32 ? float32 : bfloat16)(args, begin, end);
}

}  // namespace

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

extern const Table JOIN(table_, AFINA_ISA);
const Table JOIN(table_, AFINA_ISA) = {
    TEXT(AFINA_ISA),
    dequantize,
    quantize,
    typed<norm_rows<float>, norm_rows<bf16>, Norm>,
    typed<norm_rows_back<float>, norm_rows_back<bf16>, Norm>,
    typed<swiglu_items<float>, swiglu_items<bf16>, SwiGLU>,
    typed<swiglu_items_back<float>, swiglu_items_back<bf16>, SwiGLU>,
    typed<rotary_tokens<float>, rotary_tokens<bf16>, Rotary>,
    adamw8,
    product,
    lora,
    lora_backward,
    paged,
    mora,
    mora_backward,
    units,
    attention,
    attention_backward,
    kDots,
};

// A step of AdamW whose moments are held in eight bits (../blockwise.py, ../../training/eightbit.py): each block of 256
// numbers is read, stepped in float32 and written back at once, so that no float32 moment ever leaves the first cache.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

INLINE float widened(const float* from, i64 i) { return from[i]; }
INLINE float widened(const bf16* from, i64 i) {
    uint32_t u = uint32_t(from[i].bits) << 16;
    return read<float>(&u);
}
INLINE void put(float* to, i64 i, float x) { to[i] = x; }
INLINE void put(bf16* to, i64 i, float x) {  // to the nearest, ties to even; what is no number stays none
    uint32_t u = read<uint32_t>(&x);
    to[i].bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? u >> 16 | 64 : (u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

// The middles below x, counted on from what its highest bits say: at most one more lies below it.
INLINE uint8_t nearest8(const Eight& e, float x) {
    int code = e.starts[read<uint32_t>(&x) >> kStartShift];
    return uint8_t(code + (e.middles[code] < x));
}

void write_codes(const Eight& e, i64 block, i64 n, const float* x, int least) {
    float most = 0.0f, tiny = 1.17549435e-38f;
    for (i64 i = 0; i < n; i++) most = __builtin_fabsf(x[i]) > most ? __builtin_fabsf(x[i]) : most;
    float factor = 1.0f / (most < tiny ? tiny : most);
    uint8_t* codes = e.codes + block * kEightBlock;
    for (i64 i = 0; i < n; i++) {
        uint8_t code = nearest8(e, x[i] * factor);
        codes[i] = code < least ? least : code;
    }
    e.scales[block] = most;
}

template <class P, class G>
void adamw8_blocks(const AdamW8& job, i64 begin, i64 end) {
    alignas(64) float first[kEightBlock], second[kEightBlock], value[kEightBlock], grad[kEightBlock];
    for (i64 block = begin; block < end; block++) {
        i64 at = block * kEightBlock, n = job.count - at < kEightBlock ? job.count - at : kEightBlock;
        P* values = (P*)job.value + at;
        const G* grads = (const G*)job.grad + at;
        const uint8_t *codes1 = job.first.codes + at, *codes2 = job.second.codes + at;
        float scale1 = job.first.scales[block], scale2 = job.second.scales[block];
        for (i64 i = 0; i < n; i++) first[i] = job.first.levels[codes1[i]] * scale1;
        for (i64 i = 0; i < n; i++) second[i] = job.second.levels[codes2[i]] * scale2;
        for (i64 i = 0; i < n; i++) value[i] = widened(values, i), grad[i] = widened(grads, i);
        for (i64 i = 0; i < n; i++) {
            first[i] = first[i] + job.weight1 * (grad[i] - first[i]);
            second[i] = second[i] * job.beta2 + job.weight2 * grad[i] * grad[i];
            float size = __builtin_sqrtf(second[i] / job.correction2) + job.eps;
            value[i] = value[i] * job.decay + job.rate * (first[i] / size);
        }
        for (i64 i = 0; i < n; i++) put(values, i, value[i]);
        write_codes(job.first, block, n, first, 0);
        write_codes(job.second, block, n, second, 1);  // never rounded to zero: the first moment over nothing is a leap
    }
}

void adamw8(const void* args, i64 begin, i64 end) {
    auto& job = *(const AdamW8*)args;
    bool wide = job.type == kFloat32, wide_grad = job.grad_type == kFloat32;
    (wide ? wide_grad ? adamw8_blocks<float, float> : adamw8_blocks<float, bf16>
          : wide_grad ? adamw8_blocks<bf16, float> : adamw8_blocks<bf16, bf16>)(job, begin, end);
}

}  // namespace

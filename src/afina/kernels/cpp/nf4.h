// NF4 to numbers and back; the storage is told in ../nf4.py.
#pragma once
#include "kernels.h"
#include "pool.h"
#include "simd.h"

namespace {

// quantiles of the normal distribution: arXiv 2305.14314, appendix E
alignas(64) const float kLevels[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

INLINE i64 up(i64 n, i64 unit) { return (n + unit - 1) / unit; }

// the absmax of each block of a row
INLINE void absmax_of(const NF4& w, i64 row, float* out) {
    i64 blocks = up(w.width, kBlock), first = row * blocks;
    for (i64 i = 0; i < blocks; i++) {
        i64 at = first + i;
        out[i] = w.levels8[w.scales[at]] * w.superscales[at / kSuperBlock] + *w.offset;
    }
}

// the 32 numbers that 16 bytes stand for: the first of two is in the high half of a byte
INLINE Pair decode(const uint8_t* codes, float absmax) {
    U u = widen(codes);
    return {lookup(kLevels, u >> 4) * absmax, lookup(kLevels, u) * absmax};
}
INLINE Pair decode_part(const uint8_t* codes, i64 bytes, float absmax) {
    uint8_t buffer[16] = {};
    memcpy(buffer, codes, bytes);
    return decode(buffer, absmax);
}

INLINE void join_streaming(bf16* p, Pair x) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)p, (__m512i)joined(x));
#else
    join(p, x);
#endif
}
INLINE void join_streaming(float* p, Pair x) { join(p, x); }

template <class T, bool kStream>
void dequantize_rows(const Dequantize& job, i64 begin, i64 end) {
    const NF4& w = job.weight;
    i64 bytes = up(w.width, 2), chunks = w.width / 32, rest = w.width % 32;
    float* absmax = (float*)scratch(kRows, up(w.width, kBlock) * sizeof(float));
    for (i64 row = begin; row < end; row++) {
        absmax_of(w, row, absmax);
        const uint8_t* codes = w.codes + row * bytes;
        T* out = (T*)job.out + row * w.width;
        for (i64 c = 0; c < chunks; c++) {
            Pair x = decode(codes + 16 * c, absmax[c / 2]);
            if (kStream) join_streaming(out + 32 * c, x);
            else join(out + 32 * c, x);
        }
        if (rest) {
            T buffer[32];
            join(buffer, decode_part(codes + 16 * chunks, bytes - 16 * chunks, absmax[chunks / 2]));
            memcpy(out + 32 * chunks, buffer, rest * sizeof(T));
        }
    }
}

void dequantize(const void* args, i64 begin, i64 end) {
    auto& job = *(const Dequantize*)args;
    if (job.type == kFloat32) dequantize_rows<float, false>(job, begin, end);
    else if (job.stream) dequantize_rows<bf16, true>(job, begin, end);
    else dequantize_rows<bf16, false>(job, begin, end);
}

// how many of the 15 middles between two levels lie below x
INLINE U nearest(V x) {
    I count = {};
    for (int i = 0; i < 15; i++) count -= x > (kLevels[i] + kLevels[i + 1]) / 2;
    return (U)count;
}

template <class T>
void quantize_rows(const Quantize& job, i64 begin, i64 end) {
    i64 bytes = up(job.width, 2), blocks = up(job.width, kBlock);
    for (i64 row = begin; row < end; row++) {
        const T* from = (const T*)job.weight + row * job.width;
        for (i64 b = 0; b < blocks; b++) {
            i64 left = job.width - b * kBlock < kBlock ? job.width - b * kBlock : kBlock;
            V x[4];
            U top = {};
            for (int i = 0; i < 4; i++) {
                i64 here = left - 16 * i;
                x[i] = here >= 16 ? load(from + b * kBlock + 16 * i)
                     : here > 0 ? load_part(from + b * kBlock + 16 * i, here) : V{};
                U size = (U)x[i] & 0x7fffffffu;  // as whole numbers, infinity and NaN are above all others
                top = top > size ? top : size;
            }
            uint32_t most = 0;
            for (int i = 0; i < 16; i++) most = most > top[i] ? most : top[i];
            float absmax = read<float>(&most);
            job.absmax[row * blocks + b] = absmax;
            float tiny = 1.17549435e-38f, factor = 1.0f / (absmax < tiny ? tiny : absmax);
            uint8_t codes[64];
            for (int i = 0; i < 4; i++) narrow(codes + 16 * i, nearest(x[i] * factor));
            // beyond the end zeros stand, whose level is 7; the half byte after an odd width holds one
            for (i64 i = 0; i < up(left, 2); i++)
                job.codes[row * bytes + b * kBlock / 2 + i] = uint8_t(codes[2 * i] << 4 | codes[2 * i + 1]);
        }
    }
}

void quantize(const void* args, i64 begin, i64 end) {
    auto& job = *(const Quantize*)args;
    if (job.type == kFloat32) quantize_rows<float>(job, begin, end);
    else quantize_rows<bf16>(job, begin, end);
}

}  // namespace

// RMSNorm, SwiGLU and rotary embedding: each reads its inputs once, works in float32 and rounds once.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

// body(i, n) for i = 0, 16, ..., with n = 16, or what is left of `count`
template <class Body>
INLINE void by_16(i64 count, const Body& body) {
    i64 i = 0;
    for (; i + 16 <= count; i += 16) body(i, i64(16));
    if (i < count) body(i, count - i);
}
template <class T>
INLINE V load_n(const T* p, i64 n) {
    return n == 16 ? load(p) : load_part(p, n);
}
template <class T>
INLINE void store_n(T* p, V x, i64 n) {
    if (n == 16) store(p, x);
    else store_part(p, x, n);
}

template <class T>
INLINE float rms_scale(const T* x, i64 width, float eps) {
    V squares[2] = {};
    by_16(width, [&](i64 i, i64 n) {
        V v = load_n(x + i, n);
        squares[i / 16 % 2] = fma(v, v, squares[i / 16 % 2]);
    });
    return 1.0f / __builtin_sqrtf(sum(squares[0] + squares[1]) / float(width) + eps);
}

template <class T>
void norm_rows(const void* args, i64 begin, i64 end) {
    auto& job = *(const Norm*)args;
    const T* weight = (const T*)job.weight;
    for (i64 row = begin; row < end; row++) {
        const T* x = (const T*)job.x + row * job.width;
        T* y = (T*)job.out + row * job.width;
        float scale = rms_scale(x, job.width, job.eps);
        by_16(job.width, [&](i64 i, i64 n) { store_n(y + i, load_n(x + i, n) * scale * load_n(weight + i, n), n); });
    }
}

// grad_x = scale (g - n mean(g n)), g = grad * weight, n = x * scale
template <class T>
void norm_rows_back(const void* args, i64 begin, i64 end) {
    auto& job = *(const Norm*)args;
    const T* weight = (const T*)job.weight;
    for (i64 row = begin; row < end; row++) {
        const T *x = (const T*)job.x + row * job.width, *grad = (const T*)job.grad + row * job.width;
        T* out = (T*)job.out + row * job.width;
        float scale = rms_scale(x, job.width, job.eps);
        V along = {};
        by_16(job.width, [&](i64 i, i64 n) {
            along = fma(load_n(grad + i, n) * load_n(weight + i, n), load_n(x + i, n), along);
        });
        float shrink = scale * scale * scale * sum(along) / float(job.width);
        by_16(job.width, [&](i64 i, i64 n) {
            V g = load_n(grad + i, n) * load_n(weight + i, n);
            store_n(out + i, fma(all(-shrink), load_n(x + i, n), g * scale), n);
        });
    }
}

template <class T>
void swiglu_items(const void* args, i64 begin, i64 end) {
    auto& job = *(const SwiGLU*)args;
    by_16(end - begin, [&](i64 i, i64 n) {
        i += begin;
        V gate = load_n((const T*)job.gate + i, n), up = load_n((const T*)job.up + i, n);
        store_n((T*)job.y + i, gate * up / (1.0f + exp(-gate)), n);
    });
}

// d silu / d gate = s + silu (1 - s), s = sigmoid(gate)
template <class T>
void swiglu_items_back(const void* args, i64 begin, i64 end) {
    auto& job = *(const SwiGLU*)args;
    by_16(end - begin, [&](i64 i, i64 n) {
        i += begin;
        V gate = load_n((const T*)job.gate + i, n), up = load_n((const T*)job.up + i, n);
        V grad = load_n((const T*)job.grad + i, n), s = 1.0f / (1.0f + exp(-gate)), silu = s * gate;
        store_n((T*)job.grad_up + i, grad * silu, n);
        store_n((T*)job.grad_gate + i, grad * up * fma(silu, 1.0f - s, s), n);
    });
}

// halves of a head turn together: (a, b) -> (a cos - b sin, b cos + a sin), each half with its own angles
template <class T>
void rotary_tokens(const void* args, i64 begin, i64 end) {
    auto& job = *(const Rotary*)args;
    i64 half = job.width / 2;
    for (i64 t = begin; t < end; t++) {
        const T *cos = (const T*)job.cos + t * job.width, *sin = (const T*)job.sin + t * job.width;
        for (i64 h = 0; h < job.heads; h++) {
            const T* x = (const T*)job.x + (t * job.heads + h) * job.width;
            T* y = (T*)job.y + (t * job.heads + h) * job.width;
            by_16(half, [&](i64 i, i64 n) {
                V a = load_n(x + i, n), b = load_n(x + half + i, n);
                V cos_a = load_n(cos + i, n), cos_b = load_n(cos + half + i, n);
                V sin_a = load_n(sin + i, n), sin_b = load_n(sin + half + i, n);
                if (job.back) {  // the transpose
                    store_n(y + i, fma(b, sin_b, a * cos_a), n);
                    store_n(y + half + i, fma(-a, sin_a, b * cos_b), n);
                } else {
                    store_n(y + i, fma(-b, sin_a, a * cos_a), n);
                    store_n(y + half + i, fma(a, sin_b, b * cos_b), n);
                }
            });
        }
    }
}

}  // namespace

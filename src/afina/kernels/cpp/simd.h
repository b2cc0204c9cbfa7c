// Sixteen floats at a time, in the instruction set that this file is compiled for. GCC's and Clang's vector extensions
// do the arithmetic (on AVX2 a vector is two registers, in plain C++ what the target has); intrinsics do the rest.
//
// Everything lives in an anonymous namespace and nothing comes from the standard library's templates: a function with
// AVX-512 in it that the linker takes for everybody's would crash older machines.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
typedef uint8_t B __attribute__((vector_size(16)));
struct bf16 {
    uint16_t bits;
};
struct Pair {
    V even, odd;
};

template <class T>
INLINE T read(const void* from) {
    T made;
    memcpy(&made, from, sizeof(T));
    return made;
}
template <class T>
INLINE void write(void* to, const T& value) {
    memcpy(to, &value, sizeof(T));
}
INLINE V bits(U u) { return (V)u; }
INLINE V all(float x) { return V{} + x; }

INLINE V fma(V a, V b, V c) {
#if defined(__AVX512F__)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    union {
        V v;
        __m256 half[2];
    } x{a}, y{b}, z{c};
    z.half[0] = _mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]);
    z.half[1] = _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1]);
    return z.v;
#else
    return a * b + c;
#endif
}

INLINE float sum(V v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s[4] = {0, 0, 0, 0};
    for (int i = 0; i < 16; i++) s[i & 3] += v[i];
    return (s[0] + s[2]) + (s[1] + s[3]);
#endif
}

// ---- whole numbers of 8 and 16 bits; __builtin_convertvector would take them apart one by one (GCC 12)

union Halves {
    U all;
#if defined(__AVX2__)
    __m256i half[2];
#endif
};

INLINE U widen(const uint8_t* p) {
#if defined(__AVX512F__)
    return (U)_mm512_cvtepu8_epi32(read<__m128i>(p));
#elif defined(__AVX2__)
    Halves made;
    for (int i = 0; i < 2; i++) made.half[i] = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8 * i)));
    return made.all;
#else
    return __builtin_convertvector(read<B>(p), U);
#endif
}
INLINE U widen(const uint16_t* p) {
#if defined(__AVX512F__)
    return (U)_mm512_cvtepu16_epi32(read<__m256i>(p));
#elif defined(__AVX2__)
    Halves made;
    for (int i = 0; i < 2; i++) made.half[i] = _mm256_cvtepu16_epi32(read<__m128i>(p + 8 * i));
    return made.all;
#else
    return __builtin_convertvector(read<H>(p), U);
#endif
}
INLINE void narrow(uint16_t* p, U u) {
#if defined(__AVX512F__)
    write(p, _mm512_cvtepi32_epi16((__m512i)u));
#elif defined(__AVX2__)
    Halves from{u};
    write(p, _mm256_permute4x64_epi64(_mm256_packus_epi32(from.half[0], from.half[1]), 0xd8));
#else
    write(p, __builtin_convertvector(u, H));
#endif
}
INLINE void narrow(uint8_t* p, U u) {
#if defined(__AVX512F__)
    write(p, _mm512_cvtepi32_epi8((__m512i)u));
#else
    for (int i = 0; i < 16; i++) p[i] = uint8_t(u[i]);
#endif
}

// ---- bfloat16

// round to nearest even; the result stands in the upper half. NaN stays NaN
INLINE U rounded(V x) {
    U u = (U)x;
    U up = u + 0x7fff + ((u >> 16) & 1);
    I nan = x != x;
    return ((U)nan & 0x7fc00000u) | (~(U)nan & up);
}

INLINE V load(const float* p) { return read<V>(p); }
INLINE V load(const bf16* p) { return bits(widen(&p->bits) << 16); }
INLINE void store(float* p, V x) { write(p, x); }
INLINE void store(bf16* p, V x) {
#if defined(__AVX512BF16__)
    write(p, _mm512_cvtneps_pbh((__m512)x));  // numbers below 1e-38 become zero
#else
    narrow(&p->bits, rounded(x) >> 16);
#endif
}
INLINE float load1(const float* p) { return *p; }
INLINE float load1(const bf16* p) {
    uint32_t u = uint32_t(p->bits) << 16;
    return read<float>(&u);
}
INLINE void store1(float* p, float x) { *p = x; }
INLINE void store1(bf16* p, float x) {
    uint32_t u = read<uint32_t>(&x);
    p->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// the last n < 16 numbers of a row; what lies beyond reads as zero and is not written
template <class T>
INLINE V load_part(const T* p, int64_t n) {
    T buffer[16] = {};
    memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
}
template <class T>
INLINE void store_part(T* p, V x, int64_t n) {
    T buffer[16];
    store(buffer, x);
    memcpy(p, buffer, n * sizeof(T));
}

// 32 numbers, apart: those with even and those with odd numbers
INLINE Pair split(const bf16* p) {
    U u = read<U>(p);
    return {bits(u << 16), bits(u & 0xffff0000u)};
}
INLINE U joined(Pair x) {
#if defined(__AVX512BF16__)
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i apart = (__m512i)_mm512_cvtne2ps_pbh((__m512)x.odd, (__m512)x.even);  // numbers below 1e-38 become zero
    return (U)_mm512_permutexvar_epi16(read<__m512i>(order), apart);
#else
    return (rounded(x.even) >> 16) | (rounded(x.odd) & 0xffff0000u);
#endif
}
INLINE void join(bf16* p, Pair x) { write(p, joined(x)); }
INLINE void join(float* p, Pair x) {
    write(p, __builtin_shufflevector(x.even, x.odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    write(p + 16, __builtin_shufflevector(x.even, x.odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}

// ---- functions

// e^x within 2 units in the last place; below -87 it is 1e-38 or so, above 88 the largest power
INLINE V exp(V x) {
    const V low = all(-87.0f), high = all(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const V magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, which stands in the last bits
    V shifted = fma(x, all(1.44269504088896341f), magic);
    V n = shifted - magic;
    V r = fma(n, all(-0.693359375f), x);  // ln 2 in two parts
    r = fma(n, all(2.12194440e-4f), r);
    V p = all(1.9875691500e-4f);  // the minimax polynomial of the Cephes library's expf
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, r * r, r + 1.0f);
    return bits((U)p + ((U)shifted << 23));
}

// table[index], a table of 16; only the last four bits of an index count
INLINE V lookup(const float* table, U index) {
#if defined(__AVX512F__)
    return (V)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
    union {
        U u;
        __m256i half[2];
    } at{index};
    union {
        V v;
        __m256 half[2];
    } made;
    for (int i = 0; i < 2; i++) {
        __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at.half[i]);
        __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), at.half[i]);
        made.half[i] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at.half[i], 28)));
    }
    return made.v;
#else
    V made;
    for (int i = 0; i < 16; i++) made[i] = table[index[i] & 15];
    return made;
#endif
}

// ---- what a product is made of: 32 numbers of x times 32 of w, added up in 16 lanes

#if defined(__AVX512BF16__)
constexpr bool kDots = true;  // the machine multiplies bfloat16
typedef __m512bh W32;
INLINE V dot(V sum, W32 w, W32 x) { return (V)_mm512_dpbf16_ps((__m512)sum, w, x); }
INLINE W32 pack(Pair x) { return _mm512_cvtne2ps_pbh((__m512)x.odd, (__m512)x.even); }
#else
constexpr bool kDots = false;
#endif
INLINE V dot(V sum, Pair w, Pair x) { return fma(w.odd, x.odd, fma(w.even, x.even, sum)); }

}  // namespace

// Products of small blocks, for attention: c[m, lane] = sum over p of a[m, p] b[p, lane].
//
// b lies in vectors side by side and a is broadcast, one unit at a time: a unit is a float, or, where the machine
// multiplies bfloat16, two numbers that follow one another in p. So nothing is added up across a vector, and rows of keys
// are read where they lie, be it in pages.
#pragma once
#include "elementwise.h"
#include "pool.h"

namespace {

#if defined(__AVX512F__)
constexpr int kTileN = 4;  // vectors of b: with four rows of a, 16 sums, 4 of b and one of a in 32 registers
#else
constexpr int kTileN = 1;  // a vector is two registers of 16, or four
#endif
constexpr int rows_with(int n) { return n >= 3 || kTileN == 1 ? 4 : 8; }  // so many sums that none waits for another
constexpr int kStep = 8;                                                 // rows of a that share their first vector

template <bool Dots>
struct UnitOf {
    typedef float U;
    static constexpr i64 kNumbers = 1;
    static INLINE V at(const U* p) { return load(p); }
    static INLINE V everywhere(const U* p) { return all(*p); }
};
#if defined(__AVX512BF16__)
template <>
struct UnitOf<true> {
    typedef uint32_t U;
    static constexpr i64 kNumbers = 2;
    static INLINE W32 at(const U* p) { return read<W32>(p); }
    static INLINE W32 everywhere(const U* p) { return (W32)_mm512_set1_epi32(int(read<uint32_t>(p))); }
};
#endif
template <bool Dots>
using Unit = typename UnitOf<Dots>::U;
INLINE V dot(V sum, V w, V x) { return fma(w, x, sum); }

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 most_of(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 units_of(i64 count, i64 unit) { return (count + unit - 1) / unit; }

template <bool Dots, int N, class Row, class Give>
INLINE void block(i64 m, i64 rows, i64 n, const Row& row, i64 step, const Unit<Dots>* b, i64 stride, i64 from, i64 to, const Give& give) {
    using Here = UnitOf<Dots>;
    constexpr int M = rows_with(N);
    const Unit<Dots>* a[M];
    for (int i = 0; i < M; i++) a[i] = row(least(m + i, rows - 1)) + from * step;
    V sums[M][N] = {};
    b += from * stride + 16 * n;
    for (i64 p = from, at = 0; p < to; p++, at += step, b += stride) {
        decltype(Here::at(b)) here[N];
        for (int j = 0; j < N; j++) here[j] = Here::at(b + 16 * j);
        for (int i = 0; i < M; i++) {
            auto one = Here::everywhere(a[i] + at);
            for (int j = 0; j < N; j++) sums[i][j] = dot(sums[i][j], one, here[j]);
        }
    }
    for (int i = 0; i < M; i++)
        if (m + i < rows)
            for (int j = 0; j < N; j++) give(m + i, n + j, sums[i][j]);
}

template <bool Dots, int N, class Row, class Give>
void blocks_of(i64 m, i64 end, i64 rows, i64 n, const Row& row, i64 step, const Unit<Dots>* b, i64 stride, i64 from, i64 to, const Give& give) {
    for (; m < end; m += rows_with(N)) block<Dots, N>(m, rows, n, row, step, b, stride, from, to, give);
}

// give(m, n, c[m, 16 n ..]) for m < rows and first(m) <= n < vectors; `row(m)` is where a[m] starts, whose units stand `step`
// apart; b's p-th vectors start at p * stride. The sums go over p from start(m) to `to`. first and start are asked for
// every eighth m and hold for those that follow.
template <bool Dots, class Row, class First, class Start, class Give>
void multiply(i64 rows, i64 vectors, const Row& row, i64 step, const Unit<Dots>* b, i64 stride, i64 to, const First& first,
              const Start& start, const Give& give) {
    for (i64 m = 0; m < rows; m += kStep) {
        i64 end = least(m + kStep, rows), from = start(m);
        for (i64 n = first(m); n < vectors; n += kTileN) switch (least(vectors - n, kTileN)) {
                case 1: blocks_of<Dots, 1>(m, end, rows, n, row, step, b, stride, from, to, give); break;
#if defined(__AVX512F__)
                case 2: blocks_of<Dots, 2>(m, end, rows, n, row, step, b, stride, from, to, give); break;
                case 3: blocks_of<Dots, 3>(m, end, rows, n, row, step, b, stride, from, to, give); break;
                default: blocks_of<Dots, 4>(m, end, rows, n, row, step, b, stride, from, to, give);
#endif
            }
    }
}
INLINE i64 none(i64) { return 0; }

// ---- layouts

#if defined(__AVX512F__)
// v[i] and v[i + Half] exchange their quarters: the steps of a transposition
template <int Half>
INLINE void exchange(V* v) {
#define LOW(i) ((i) & Half ? ((i) & ~Half) + 16 : (i))
#define HIGH(i) ((i) & Half ? (i) + 16 : (i) + Half)
#define LANES(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
    for (int i = 0; i < 16; i++)
        if (!(i & Half)) {
            V low = __builtin_shufflevector(v[i], v[i + Half], LANES(LOW));
            v[i + Half] = __builtin_shufflevector(v[i], v[i + Half], LANES(HIGH));
            v[i] = low;
        }
#undef LANES
#undef HIGH
#undef LOW
}
INLINE void transpose(V* v) { exchange<1>(v), exchange<2>(v), exchange<4>(v), exchange<8>(v); }
#else
INLINE void transpose(V* v) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) {
            float kept = v[i][j];
            v[i][j] = v[j][i], v[j][i] = kept;
        }
}
#endif

// 16 units of a row from number `i` on, of which `count` numbers are there
template <bool Dots, class T>
INLINE V sixteen_units(const T* p, i64 count) {
    if constexpr (Dots) {
        if (count >= 32) return read<V>(p);
        uint16_t buffer[32] = {};
        memcpy(buffer, p, count * sizeof(T));
        return read<V>(buffer);
    } else {
        return load_n(p, least(count, 16));
    }
}

// rows as the b of a product over their numbers: out[unit * stride + row]; row(r) is null for rows that are not there
template <bool Dots, class Row>
void across(i64 rows, i64 width, const Row& row, Unit<Dots>* out, i64 stride) {
    constexpr i64 kNumbers = UnitOf<Dots>::kNumbers;
    i64 units = units_of(width, kNumbers);
    for (i64 r = 0; r < rows; r += 16)
        for (i64 u = 0; u < units; u += 16) {
            V v[16];
            for (i64 i = 0; i < 16; i++) {
                auto* from = r + i < rows ? row(r + i) : nullptr;
                v[i] = from ? sixteen_units<Dots>(from + u * kNumbers, width - u * kNumbers) : V{};
            }
            transpose(v);
            for (i64 i = 0; i < 16 && u + i < units; i++) write(out + (u + i) * stride + r, v[i]);
        }
}

// rows as what a product over them takes, a or b: out[r * stride + c], where two rows make one of units; zeros stand for
// rows beyond, up to `full`, and for columns beyond
template <bool Dots, class Row>
void side_on(i64 rows, i64 full, i64 width, const Row& row, Unit<Dots>* out, i64 stride) {
    constexpr i64 kNumbers = UnitOf<Dots>::kNumbers;
    for (i64 r = 0; r < full; r += kNumbers, out += stride)
        by_16(width, [&](i64 c, i64 n) {
            if constexpr (Dots) {
                auto half = [&](i64 k) {
                    if (k >= rows) return U{};
                    if (n == 16) return widen(&row(k)[c].bits);
                    uint16_t buffer[16] = {};
                    memcpy(buffer, row(k) + c, n * 2);
                    return widen(buffer);
                };
                write(out + c, half(r) | half(r + 1) << 16);
            } else {
                store(out + c, r < rows ? load_n(row(r) + c, n) : V{});
            }
        });
}

// rows as the a of a product over their numbers: where they lie, if that will do, else copied into `buffer`
template <bool Dots, class Row>
void along(i64 rows, i64 width, const Row& row, Unit<Dots>* buffer, i64 stride, const Unit<Dots>** out) {
    constexpr i64 kNumbers = UnitOf<Dots>::kNumbers;
    constexpr bool same = kNumbers * sizeof(*row(0)) == sizeof(Unit<Dots>);
    for (i64 r = 0; r < rows; r++) {
        if (same && width % kNumbers == 0) {
            out[r] = (const Unit<Dots>*)row(r);
            continue;
        }
        out[r] = buffer + r * stride;
        for (i64 c = 0; c < width; c += 16 * kNumbers) write(buffer + r * stride + c / kNumbers, sixteen_units<Dots>(row(r) + c, width - c));
    }
}

// 2^x within a few units in the last place; below -126 it is 1e-38
INLINE V exp2(V x) {
    const V low = all(-126.0f), magic = all(12582912.0f);  // 1.5 * 2^23, as in exp
    x = x < low ? low : x;
    V shifted = x + magic;
    V r = x - (shifted - magic);
    V p = all(1.327647203e-3f);  // within 8e-8 of 2^r for |r| <= 1/2: Lawson's iteration on 4,001 points
    p = fma(p, r, all(9.675541480e-3f));
    p = fma(p, r, all(5.550713275e-2f));
    p = fma(p, r, all(2.402211972e-1f));
    p = fma(p, r, all(6.931469671e-1f));
    p = fma(p, r, all(1.000000072f));
    return bits((U)p + ((U)shifted << 23));
}

}  // namespace

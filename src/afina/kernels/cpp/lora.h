// The adapters' part of a layer, all of them in one call, whatever their ranks: for each segment of adapter k
//
//     y[rows]      += low B_k^T          low   = w x[rows] A_k^T         (r numbers a row)
//     grad_x[rows] += thin A_k           thin  = w grad[rows] B_k
//     grad_A_k      = sum of thin^T x    grad_B_k^T = sum of low^T grad  (over the segments of k)
//
// B comes transposed, so that every product is one of two: dot products of rows (product.h), or sums of rows.
#pragma once
#include "product.h"

namespace {

// out[i, :] += sum over k of factor(i, k) * row(k): R rows of out, C vectors of 16 columns, last one perhaps not full
template <int R, int C, class T, class Factor, class Row, class Sum>
INLINE void add_rows(i64 count, const Factor& factor, const Row& row, i64 rest, const Sum& give) {
    V sums[R][C] = {};
    for (i64 k = 0; k < count; k++) {
        const T* from = row(k);
        V x[C];
        for (int j = 0; j < C; j++) x[j] = rest ? load_part(from + 16 * j, rest) : load(from + 16 * j);
        for (int i = 0; i < R; i++)
            for (int j = 0; j < C; j++) sums[i][j] = fma(all(factor(i, k)), x[j], sums[i][j]);
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) give(i, j, sums[i][j]);
}

#if defined(__AVX512F__)
constexpr int kSumR = 4, kSumC = 4;
#else
constexpr int kSumR = 2, kSumC = 2;
#endif

// the same with up to R rows of the `rows` that are left; returns how many it did
template <int R, int C, class T, class Factor, class Row, class Sum>
INLINE i64 add_some(i64 rows, i64 count, const Factor& factor, const Row& row, i64 rest, const Sum& give) {
    if constexpr (R > 1)
        if (rows < R) return add_some<R - 1, C, T>(rows, count, factor, row, rest, give);
    add_rows<R, C, T>(count, factor, row, rest, give);
    return R;
}

// the same over all rows of out, and columns first..last
template <class T, class Factor, class Row, class Sum>
void add_up(i64 rows, i64 first, i64 last, i64 count, const Factor& factor, const Row& row, const Sum& give) {
    for (i64 c = first; c < last;) {
        i64 left = last - c, step = left >= 16 * kSumC ? 16 * kSumC : left >= 16 ? 16 : left;
        auto column = [&](i64 k) { return row(k) + c; };
        for (i64 i = 0; i < rows;) {
            auto here = [&](i64 r, i64 k) { return factor(i + r, k); };
            auto to = [&](i64 r, i64 j, V sum) { give(i + r, c + 16 * j, sum, left); };
            if (step == 16 * kSumC) i += add_some<kSumR, kSumC, T>(rows - i, count, here, column, 0, to);
            else i += add_some<kSumR, 1, T>(rows - i, count, here, column, step % 16, to);
        }
        c += step;
    }
}

template <class T>
INLINE void add_into(T* to, V sum, i64 left) {
    if (left >= 16) store(to, load(to) + sum);
    else store_part(to, load_part(to, left) + sum, left);
}

#if defined(__AVX512BF16__)
// The same where the machine multiplies bfloat16: two rows at a time, side by side, against a pair of factors, which
// factor(i, p) gives as rows 2p and 2p + 1 want them.
INLINE void side_by_side(const bf16* a, const bf16* b, W32* pairs) {
    alignas(64) static constexpr uint16_t order[64] = {
        0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
        16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    __m512i x = read<__m512i>(a), y = read<__m512i>(b);
    pairs[0] = (W32)_mm512_permutex2var_epi16(x, read<__m512i>(order), y);
    pairs[1] = (W32)_mm512_permutex2var_epi16(x, read<__m512i>(order + 32), y);
}

template <int R, int C, class Factor, class Row, class Sum>  // C chunks of 32 columns; `rest` where one is not full
INLINE i64 add_pairs(i64 rows, i64 count, const Factor& factor, const Row& row, i64 rest, const Sum& give) {
    if constexpr (R > 1)
        if (rows < R) return add_pairs<R - 1, C>(rows, count, factor, row, rest, give);
    V sums[R][2 * C] = {};
    for (i64 p = 0; 2 * p < count; p++) {
        const bf16 *a = row(2 * p), *b = row(2 * p + 1 < count ? 2 * p + 1 : 2 * p);
        bf16 ends[2][32] = {};
        if (rest) memcpy(ends[0], a, rest * sizeof(bf16)), memcpy(ends[1], b, rest * sizeof(bf16)), a = ends[0], b = ends[1];
        W32 x[2 * C];
        for (int j = 0; j < C; j++) side_by_side(a + 32 * j, b + 32 * j, x + 2 * j);
        for (int i = 0; i < R; i++) {
            W32 both = (W32)_mm512_set1_epi32(factor(i, p));
            for (int j = 0; j < 2 * C; j++) sums[i][j] = dot(sums[i][j], x[j], both);
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < 2 * C; j++) give(i, j, sums[i][j]);
    return R;
}

template <class Factor, class Row, class Sum>
void add_up_pairs(i64 rows, i64 first, i64 last, i64 count, const Factor& factor, const Row& row, const Sum& give) {
    for (i64 c = first; c < last; c += last - c >= 64 ? 64 : 32) {
        i64 left = last - c;
        auto column = [&](i64 k) { return row(k) + c; };
        for (i64 i = 0; i < rows;) {
            auto here = [&](i64 r, i64 p) { return factor(i + r, p); };
            auto to = [&](i64 r, i64 j, V sum) {
                if (16 * j < left) give(i + r, c + 16 * j, sum, left - 16 * j);
            };
            if (left >= 64) i += add_pairs<4, 2>(rows - i, count, here, column, 0, to);
            else i += add_pairs<4, 1>(rows - i, count, here, column, left < 32 ? left : 0, to);
        }
    }
}

INLINE int pair_at(const bf16* p) { return read<int>(p); }
#endif

// low (rows, rank) as factors in bfloat16: rows of `rank`, or their transpose, each row filled up to an even number
template <bool Transposed>
INLINE void as_factors(const float* low, i64 rows, i64 rank, bf16* out) {
    i64 stride = Transposed ? up(rows, 2) * 2 : up(rank, 2) * 2;
    for (i64 i = 0; i < rows; i++)
        for (i64 k = 0; k < rank; k++) store1(out + (Transposed ? k * stride + i : i * stride + k), low[i * rank + k]);
    if (Transposed && rows % 2)
        for (i64 k = 0; k < rank; k++) out[k * stride + rows] = bf16{0};
    if (!Transposed && rank % 2)
        for (i64 i = 0; i < rows; i++) out[i * stride + rank] = bf16{0};
}

// low[i, k] = weight * x[i, :] . a[k, :] for the rows of a part, then y[i, :] += sum over k of low[i, k] b[k, :]
template <class T, bool Dots>
void through(const Part& part, i64 rank, const T* x, i64 in, const void* a, T* y, i64 out, const void* b, float* low) {
    using X = typename Dense<Dots>::X;
    constexpr bool apart = sizeof(T) != sizeof(X);
    i64 rows = part.end - part.start;
    const X* laid = laid_out<apart, T, X>(x + part.start * in, rows, in);
    auto keep = [&](i64 i, i64 k, float sum) { low[i * rank + k] = part.weight * sum; };
    dots(rows, Plain<Dots, apart, T>{(const T*)a, in}, 0, rank, laid, up(in, 32) * 32, keep);
    if (!y) return;
    T* to = y + part.start * out;
#if defined(__AVX512BF16__)
    if constexpr (Dots) {
        i64 stride = up(rank, 2) * 2;
        bf16* factors = (bf16*)scratch(kFactors, rows * stride * sizeof(bf16));
        as_factors<false>(low, rows, rank, factors);
        return add_up_pairs(rows, 0, out, rank, [&](i64 i, i64 p) { return pair_at(factors + i * stride + 2 * p); },
                            [&](i64 k) { return (const T*)b + k * out; },
                            [&](i64 i, i64 c, V sum, i64 left) { add_into(to + i * out + c, sum, left); });
    }
#endif
    add_up<T>(rows, 0, out, rank, [&](i64 i, i64 k) { return low[i * rank + k]; },
              [&](i64 k) { return (const T*)b + k * out; },
              [&](i64 i, i64 c, V sum, i64 left) { add_into(to + i * out + c, sum, left); });
}

template <class T, bool Dots>
void lora_tiles(const void* args, i64 begin, i64 end) {
    auto& job = *(const LoRAJob*)args;
    for (i64 n = job.tiles[begin]; n < job.tiles[end]; n++) {
        const Part& part = job.parts[job.order[n]];
        i64 k = part.adapter, rank = job.ranks[k];
        float* low = (float*)scratch(kRows, (part.end - part.start) * rank * sizeof(float));
        through<T, Dots>(part, rank, (const T*)job.x, job.in, job.a[k], (T*)job.y, job.out, job.bt[k], low);
    }
}

// what the gradients of A and B are made of, and the gradient of x; `low` is made again, which is cheaper than keeping it
template <class T, bool Dots>
void lora_tiles_back(const void* args, i64 begin, i64 end) {
    auto& job = *(const LoRAJob*)args;
    for (i64 n = job.tiles[begin]; n < job.tiles[end]; n++) {
        i64 i = job.order[n], k = job.parts[i].adapter, rank = job.ranks[k];
        float *low = job.low + job.places[i], *thin = job.thin + job.places[i];
        through<T, Dots>(job.parts[i], rank, (const T*)job.x, job.in, job.a[k], (T*)nullptr, job.out, job.bt[k], low);
        through<T, Dots>(job.parts[i], rank, (const T*)job.grad, job.out, job.bt[k], (T*)job.grad_x, job.in, job.a[k], thin);
        if (!Dots) continue;
        i64 rows = job.parts[i].end - job.parts[i].start;  // as the sums over rows want them, in the same place
        float* both[2] = {low, thin};
        for (float* numbers : both) {
            float* copy = (float*)scratch(kFactors, rows * rank * sizeof(float));
            memcpy(copy, numbers, rows * rank * sizeof(float));
            as_factors<true>(copy, rows, rank, (bf16*)numbers);
        }
    }
}

constexpr i64 kWorth = 1 << 17;  // multiply-adds: some 5 microseconds
constexpr i64 kColumns = 64;  // of a gradient, an item

// gradient (r, width) of one matrix in columns first..last: sum over the adapter's rows of low[row, k] * x[row, :]
template <class T, bool Dots>
void gradient(const LoRAJob& job, i64 adapter, const float* low, const T* x, i64 width, float* out, i64 first, i64 last) {
    i64 rank = job.ranks[adapter];
    for (i64 k = 0; k < rank; k++) memset(out + k * width + first, 0, (last - first) * sizeof(float));
    for (i64 i = job.firsts[adapter]; i < job.firsts[adapter + 1]; i++) {
        const Part& part = job.parts[i];
        const float* here = low + job.places[i];
#if defined(__AVX512BF16__)
        if constexpr (Dots) {
            i64 rows = part.end - part.start, stride = up(rows, 2) * 2;
            add_up_pairs(rank, first, last, rows, [&](i64 k, i64 p) { return pair_at((const bf16*)here + k * stride + 2 * p); },
                         [&](i64 row) { return x + (part.start + row) * width; },
                         [&](i64 k, i64 c, V sum, i64 left) { add_into(out + k * width + c, sum, left); });
            continue;
        }
#endif
        add_up<T>(rank, first, last, part.end - part.start, [&](i64 k, i64 row) { return here[row * rank + k]; },
                  [&](i64 row) { return x + (part.start + row) * width; },
                  [&](i64 k, i64 c, V sum, i64 left) { add_into(out + k * width + c, sum, left); });
    }
}

template <class T, bool Dots>
void lora_gradients(const void* args, i64 begin, i64 end) {
    auto& job = *(const LoRAJob*)args;
    i64 ins = up(job.in, kColumns), outs = up(job.out, kColumns);
    for (i64 i = begin; i < end; i++) {
        i64 adapter = i / (ins + outs), column = i % (ins + outs);
        if (column < ins) {
            i64 first = column * kColumns, last = first + kColumns < job.in ? first + kColumns : job.in;
            gradient<T, Dots>(job, adapter, job.thin, (const T*)job.x, job.in, job.grad_a[adapter], first, last);
        } else {
            i64 first = (column - ins) * kColumns, last = first + kColumns < job.out ? first + kColumns : job.out;
            gradient<T, Dots>(job, adapter, job.low, (const T*)job.grad, job.out, job.grad_bt[adapter], first, last);
        }
    }
}

// tiles that are worth waking a thread for: a decoding step's few rows take less time than that
i64 tiles_worth(const LoRAJob& job) {
    i64 numbers = 1;
    for (i64 k = 0; k < job.adapters; k++)
        for (i64 i = job.firsts[k]; i < job.firsts[k + 1]; i++)
            numbers += (job.parts[i].end - job.parts[i].start) * job.ranks[k] * (job.in + job.out);
    return 1 + kWorth * job.tile_count / numbers;
}

void lora(const LoRAJob& job, int threads) {
    bool wide = job.type == kFloat32;
    run(threads, job.tile_count, tiles_worth(job), wide ? lora_tiles<float, false> : lora_tiles<bf16, kDots>, &job);
}

void lora_backward(const LoRAJob& job, int threads) {
    bool wide = job.type == kFloat32;
    run(threads, job.tile_count, 1, wide ? lora_tiles_back<float, false> : lora_tiles_back<bf16, kDots>, &job);
    i64 items = job.adapters * (up(job.in, kColumns) + up(job.out, kColumns));
    run(threads, items, 1, wide ? lora_gradients<float, false> : lora_gradients<bf16, kDots>, &job);
}

}  // namespace

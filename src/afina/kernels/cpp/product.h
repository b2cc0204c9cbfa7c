// The product of a few rows with a matrix, at the speed at which the matrix is read:
//
//     y[m, n] = x[m, :] . W[n, :] + bias[n]
//
// A tile of y is a handful of dot products side by side, 32 numbers of x and W at a time (a chunk). W comes as bfloat16,
// float32 or NF4; NF4 is decoded in registers, or, for more rows than one tile has, into a buffer of a few rows of W.
// Where decoding W yields even and odd numbers apart, x is put in that order beforehand: then nothing is put back.
#pragma once
#include "nf4.h"
#include "pool.h"

namespace {

#if defined(__AVX512F__)
constexpr int kTileM = 8;
constexpr int rows_per_panel(int m) { return m <= 4 ? 4 : 2; }  // 16 sums at most, in 32 registers
#else
constexpr int kTileM = 2;
constexpr int rows_per_panel(int) { return 2; }
#endif
constexpr i64 kStrip = 8;  // rows of W an item: in the cache while all rows of x pass

template <bool Dots>
struct Dense;  // how x, and W once decoded, lie in memory: chunks of 32
template <>
struct Dense<false> {
    typedef float X;
    static INLINE Pair at(const X* p) { return {load(p), load(p + 16)}; }
    static INLINE void put(X* p, Pair x) { store(p, x.even), store(p + 16, x.odd); }
};
#if defined(__AVX512BF16__)
template <>
struct Dense<true> {
    typedef bf16 X;
    static INLINE W32 at(const X* p) { return read<W32>(p); }
    static INLINE void put(X* p, Pair x) { write(p, pack(x)); }
};
#endif

// W's rows, whatever they are stored as: at(n, c) is chunk c of row n, end(n, c) the same for a chunk that is not full;
// ahead(n, c) asks memory for what the next strip has there, so that reading goes on while sums are made
template <bool Dots, bool Apart, class T>
struct Plain {
    static constexpr bool kDots = Dots, kApart = Apart;
    const T* w;
    i64 width;
    INLINE auto chunk(const T* p) const {
        if constexpr (Apart) return split(p);
        else return Dense<Dots>::at(p);
    }
    INLINE auto at(i64 n, i64 c) const { return chunk(w + n * width + 32 * c); }
    INLINE void ahead(i64 n, i64 c) const { __builtin_prefetch(w + (n + kStrip) * width + 32 * c); }
    INLINE auto end(i64 n, i64 c) const {
        T buffer[32] = {};
        memcpy(buffer, w + n * width + 32 * c, (width - 32 * c) * sizeof(T));
        return chunk(buffer);
    }
};
template <bool Dots>
struct Fours {
    static constexpr bool kDots = Dots, kApart = true;
    const uint8_t* codes;
    const float* absmax;  // (rows, blocks)
    i64 width, bytes, blocks;
    INLINE auto made(Pair x) const {
#if defined(__AVX512BF16__)
        if constexpr (Dots) return pack(x);
        else
#endif
            return x;
    }
    INLINE void ahead(i64 n, i64 c) const {
        if (c % 4 == 0) __builtin_prefetch(codes + (n + kStrip) * bytes + 16 * c);
    }
    INLINE auto at(i64 n, i64 c) const { return made(decode(codes + n * bytes + 16 * c, absmax[n * blocks + c / 2])); }
    INLINE auto end(i64 n, i64 c) const {
        return made(decode_part(codes + n * bytes + 16 * c, bytes - 16 * c, absmax[n * blocks + c / 2]));
    }
};
template <bool Dots>
struct Buffered {  // rows that were decoded into whole chunks
    static constexpr bool kDots = Dots;
    const typename Dense<Dots>::X* w;
    i64 stride, width;
    INLINE auto at(i64 n, i64 c) const { return Dense<Dots>::at(w + n * stride + 32 * c); }
    INLINE void ahead(i64, i64) const {}
    INLINE auto end(i64 n, i64 c) const { return at(n, c); }
};

template <int M, int N, class Rows, class X, class Give>
INLINE void tile(const Rows& rows, i64 n, const X* x, i64 stride, const Give& give) {
    V sums[M][N] = {};
    i64 full = rows.width / 32;
    for (i64 c = 0; c < full; c++) {
        decltype(rows.at(0, 0)) w[N];
        for (int j = 0; j < N; j++) w[j] = rows.at(n + j, c), rows.ahead(n + j, c);
        for (int i = 0; i < M; i++) {
            auto here = Dense<Rows::kDots>::at(x + i * stride + 32 * c);
            for (int j = 0; j < N; j++) sums[i][j] = dot(sums[i][j], w[j], here);
        }
    }
    if (rows.width % 32)
        for (int j = 0; j < N; j++) {
            auto w = rows.end(n + j, full);
            for (int i = 0; i < M; i++)
                sums[i][j] = dot(sums[i][j], w, Dense<Rows::kDots>::at(x + i * stride + 32 * full));
        }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) give(i, n + j, sum(sums[i][j]));
}

// rows n..end of W with M rows of x
template <int M, class Rows, class X, class Give>
void strip(const Rows& rows, i64 n, i64 end, const X* x, i64 stride, const Give& give) {
    constexpr int N = rows_per_panel(M);
    for (; n + N <= end; n += N) tile<M, N>(rows, n, x, stride, give);
    for (; n < end; n++) tile<M, 1>(rows, n, x, stride, give);
}

// rows n..end of W with m rows of x, at most kTileM
template <class Rows, class X, class Give, int M = kTileM>
INLINE void strips(i64 m, const Rows& rows, i64 n, i64 end, const X* x, i64 stride, const Give& give) {
    if constexpr (M > 0) {
        if (m == M) strip<M>(rows, n, end, x, stride, give);
        else strips<Rows, X, Give, M - 1>(m, rows, n, end, x, stride, give);
    }
}

// the same with any number of rows: give(i, j, sum) gets every dot product of x's row i and W's row j
template <class Rows, class X, class Give>
void dots(i64 m, const Rows& rows, i64 n, i64 end, const X* x, i64 stride, const Give& give) {
    for (i64 i = 0; i < m; i += kTileM) {
        auto moved = [&](i64 row, i64 column, float sum) { give(i + row, column, sum); };
        strips(m - i < kTileM ? m - i : kTileM, rows, n, end, x + i * stride, stride, moved);
    }
}

// x in whole chunks, zeros at the end; even and odd numbers of a chunk apart if asked for
template <bool Apart, class T, class X>
void lay_out(const T* x, i64 rows, i64 width, X* out) {
    for (i64 row = 0; row < rows; row++)
        for (i64 c = 0; c < up(width, 32); c++, out += 32) {
            T chunk[32] = {};
            i64 here = width - 32 * c < 32 ? width - 32 * c : 32;
            memcpy(chunk, x + row * width + 32 * c, here * sizeof(T));
            for (int i = 0; i < 32; i++) {
                const T& from = chunk[Apart ? 2 * (i % 16) + i / 16 : i];
                if constexpr (sizeof(T) == sizeof(X)) out[i] = from;
                else out[i] = load1(&from);
            }
        }
}

// x as the rows of W want it: as it lies, if it can
template <bool Apart, class T, class X>
const X* laid_out(const T* x, i64 rows, i64 width) {
    if constexpr (!Apart && sizeof(T) == sizeof(X))
        if (width % 32 == 0) return (const X*)x;
    X* out = (X*)scratch(kInput, rows * up(width, 32) * 32 * sizeof(X));
    lay_out<Apart>(x, rows, width, out);
    return out;
}

template <class T>
struct Give {
    const Product& p;
    INLINE void operator()(i64 i, i64 j, float sum) const {
        if (p.bias) sum += load1((const T*)p.bias + j);
        if (p.wide) store1((float*)p.y + i * p.n + j, sum);
        else store1((T*)p.y + i * p.n + j, sum);
    }
};

struct Laid {
    const Product& product;
    const void* x;
};

template <class T, bool Dots>
void plain_strips(const void* args, i64 begin, i64 end) {
    using X = typename Dense<Dots>::X;
    const Product& p = ((const Laid*)args)->product;
    Plain<Dots, sizeof(T) != sizeof(X), T> rows{(const T*)p.w, p.k};
    i64 last = end * kStrip < p.n ? end * kStrip : p.n;
    dots(p.m, rows, begin * kStrip, last, (const X*)((const Laid*)args)->x, up(p.k, 32) * 32, Give<T>{p});
}

template <class T, bool Dots>
void nf4_strips(const void* args, i64 begin, i64 end) {
    using X = typename Dense<Dots>::X;
    const Product& p = ((const Laid*)args)->product;
    const X* x = (const X*)((const Laid*)args)->x;
    i64 bytes = up(p.k, 2), blocks = up(p.k, kBlock), chunks = up(p.k, 32), stride = chunks * 32;
    X* decoded = (X*)scratch(kRows, kStrip * (stride * sizeof(X) + blocks * sizeof(float)));
    float* absmax = (float*)(decoded + kStrip * stride);
    for (i64 n = begin * kStrip; n < end * kStrip && n < p.n; n += kStrip) {
        i64 rows = p.n - n < kStrip ? p.n - n : kStrip;
        for (i64 j = 0; j < rows; j++) absmax_of(p.nf4, n + j, absmax + j * blocks);
        Fours<Dots> fours{p.nf4.codes + n * bytes, absmax, p.k, bytes, blocks};
        auto give = [&](i64 i, i64 j, float sum) { Give<T>{p}(i, n + j, sum); };
        if (p.m <= kTileM) {
            dots(p.m, fours, 0, rows, x, stride, give);
            continue;
        }
        for (i64 j = 0; j < rows; j++)
            for (i64 c = 0; c < chunks; c++) {
                fours.ahead(j, c);
                write(decoded + j * stride + 32 * c, c < p.k / 32 ? fours.at(j, c) : fours.end(j, c));
            }
        dots(p.m, Buffered<Dots>{decoded, stride, p.k}, 0, rows, x, stride, give);
    }
}

template <class T, bool Dots>
void product_of(const Product& p, int threads) {
    using X = typename Dense<Dots>::X;
    if (p.w) {
        Laid job{p, laid_out<sizeof(T) != sizeof(X), T, X>((const T*)p.x, p.m, p.k)};
        run(threads, up(p.n, kStrip), 1, plain_strips<T, Dots>, &job);
    } else {
        Laid job{p, laid_out<true, T, X>((const T*)p.x, p.m, p.k)};
        run(threads, up(p.n, kStrip), 1, nf4_strips<T, Dots>, &job);
    }
}

void product(const Product& p, int threads) {
    if (p.type == kFloat32) product_of<float, false>(p, threads);
    else product_of<bf16, kDots>(p, threads);
}

}  // namespace

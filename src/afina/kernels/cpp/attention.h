// Causal attention of pieces of sequences: prompts, long or after a history that lies in pages, and training.
//
//     out[i, h] = sum over k of p[k] V[k]        p = softmax over k of scaling q[i, h] . K[k]
//
// An item is a block: 64 rows (a query and a head are one), of all heads that share keys, of one sequence. Rows are the lanes of
// the vectors: 64 keys at a time, scores^T = K q^T and out^T += V^T p^T are products as in blocks.h, for which K is read
// where it lies. The softmax goes on as keys come (Milakov and Gimelshein 2018, arXiv 1805.02867; blocks as in Dao et al.
// 2022, arXiv 2205.14135), in float32; where products take bfloat16, weights are rounded to it, as V is.
#pragma once
#include "blocks.h"

namespace {

constexpr int kVectors = 4;          // vectors of rows
constexpr i64 kLanes = 16 * kVectors;
constexpr i64 kChunk = 64;           // keys
constexpr float kHidden = -3e38f, kLeast = -1e30f;  // a key that is not seen; less than any score
constexpr float kLog2e = 1.44269504088896341f;

struct Rows {  // of a block
    i64 count, vectors, first, last;  // how many; in how many vectors; positions of the first and the last one
    i64 token[kLanes], head[kLanes];
    I position[kVectors];
    Rows(const Attention& job, const Block& b) : count(b.rows), vectors(units_of(b.rows, 16)) {
        i64 group = job.heads / job.kv_heads, query = b.row / group, shared = b.row % group;
        first = b.past + query;
        alignas(64) int32_t places[kLanes];
        for (i64 r = 0; r < 16 * vectors; r++) {
            token[r] = b.query + query, head[r] = b.head * group + shared, places[r] = int32_t(b.past + query);
            if (r + 1 < count && ++shared == group) shared = 0, query++;
        }
        memcpy(position, places, sizeof(position));
        last = b.past + query;
    }
    // a row of something of (T, heads, width), whose tokens and heads stand so far apart
    template <class T>
    const T* at(const Strided& x, i64 r) const {
        return (const T*)x.at + token[r] * x.token + head[r] * x.head;
    }
};

template <class T>
struct Keys {  // of a chunk: where their rows lie
    const T *key[kChunk], *value[kChunk];
    Keys(const Attention& job, const Block& b, i64 begin, i64 count) {
        for (i64 j = 0; j < count; j++) {
            i64 k = begin + j;
            if (job.tables) {
                const Paging& p = job.paging;
                i64 page = job.tables[b.sequence * p.table_width + k / p.page_size];
                key[j] = (const T*)p.kv + page * p.page_stride + (b.head * p.page_size + k % p.page_size) * job.width;
                value[j] = key[j] + job.kv_heads * p.page_size * job.width;
            } else {
                i64 token = b.query - b.past + k;
                key[j] = (const T*)job.key.at + token * job.key.token + b.head * job.key.head;
                value[j] = (const T*)job.value.at + token * job.value.token + b.head * job.value.head;
            }
        }
    }
};

// the first vector in which a row sees key `begin + j`
struct FirstVector {
    i64 start, group, vectors;
    FirstVector(const Attention& job, const Block& b, const Rows& rows, i64 begin)
        : start((begin - b.past) * (job.heads / job.kv_heads) - b.row), group(job.heads / job.kv_heads), vectors(rows.vectors) {}
    INLINE i64 operator()(i64 j) const {
        i64 row = start + (j & ~i64(kStep - 1)) * group;
        return row <= 0 ? 0 : least(row / 16, vectors);
    }
};

// whether some of the block's rows do not see some of keys begin..begin + count
INLINE bool partly_hidden(const Attention& job, const Rows& rows, i64 begin, i64 count) {
    return begin + count > rows.first + 1 || (job.window && begin <= rows.last - job.window);
}
INLINE V only_seen(const Attention& job, V score, I position, i64 key) {
    I seen = position >= int32_t(key);
    if (job.window) seen &= position - int32_t(job.window) < int32_t(key);
    return seen ? score : all(kHidden);
}
INLINE V bent(V score, float softcap) {  // c tanh(s / c)
    return softcap - 2 * softcap / (exp(score * (2 / softcap)) + 1.0f);
}
INLINE bool any(I v) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)v) != 0;
#else
    int32_t found = 0;
    for (int i = 0; i < 16; i++) found |= v[i];
    return found != 0;
#endif
}

struct Softmax {  // of the rows so far; logarithms to base 2
    V most[kVectors], total[kVectors], top[kVectors];
    Softmax() {
        for (int n = 0; n < kVectors; n++) most[n] = top[n] = all(kLeast), total[n] = V{};
    }
    // Sums are made for `most` and scaled anew when a score is above it. At once, not only when it is well above: the largest
    // weight is then 1, which bfloat16 holds exactly, where 2^s was 3.5% further from the truth.
    INLINE void renew(i64 vectors, float* sums, i64 width) {
        for (i64 n = 0; n < vectors; n++) {
            if (!any(top[n] > most[n])) continue;
            V less = exp2(most[n] - top[n]);
            total[n] *= less, most[n] = top[n];
            for (i64 d = 0; d < width; d++) store(sums + d * kLanes + 16 * n, load(sums + d * kLanes + 16 * n) * less);
        }
    }
};

// row pairs as units: where products take bfloat16, two rows of numbers side by side
template <bool Dots>
INLINE void put_rows(Unit<Dots>* out, i64 row, V even, V odd) {
    if constexpr (Dots) write(out + row / 2 * kLanes, joined({even, odd}));
    else store(out + row * kLanes, even), store(out + (row + 1) * kLanes, odd);
}

// lanes^T (width, kLanes) times a factor each, to the rows of (T, heads, width)
template <class Q>
void put_across(const Rows& rows, const Strided& to, const float* from, i64 width, const V* factor) {
    for (i64 n = 0; n < rows.vectors; n++)
        by_16(width, [&](i64 d, i64 left) {
            V v[16];
            for (i64 i = 0; i < 16; i++) v[i] = i < left ? load(from + (d + i) * kLanes + 16 * n) * factor[n] : V{};
            transpose(v);
            for (i64 i = 0; i < 16 && 16 * n + i < rows.count; i++) store_n((Q*)rows.at<Q>(to, 16 * n + i) + d, v[i], left);
        });
}

template <class Q, class T, bool Dots>
void attend_block(const Attention& job, const Block& b) {
    using U = Unit<Dots>;
    constexpr i64 kNumbers = UnitOf<Dots>::kNumbers;
    i64 width = job.width, units = units_of(width, kNumbers), stride = units_of(width, 16) * 16;
    Rows rows(job, b);
    U* query = (U*)scratch(kInput, sizeof(U) * kLanes * units);
    float* sums = (float*)scratch(kRows, sizeof(float) * (kLanes * width + kChunk * (kLanes + 2 * stride)));  // out^T
    float* scores = sums + kLanes * width;  // (kChunk, kLanes), and then weights in their place
    U *weights = (U*)scores, *values = (U*)(scores + kChunk * kLanes), *buffer = values + kChunk * stride;
    across<Dots>(rows.count, width, [&](i64 r) { return rows.at<Q>(job.query, r); }, query, kLanes);
    memset(sums, 0, sizeof(float) * kLanes * width);
    Softmax softmax;
    float factor = job.softcap > 0 ? job.scaling : job.scaling * kLog2e;
    for (i64 count, begin = b.begin; begin <= rows.last; begin += count) {
        count = least(kChunk, rows.last + 1 - begin);
        Keys<T> keys(job, b, begin, count);
        FirstVector first(job, b, rows, begin);
        const U* at[kChunk];
        along<Dots>(count, width, [&](i64 j) { return keys.key[j]; }, buffer, stride, at);
        bool edge = partly_hidden(job, rows, begin, count);
        multiply<Dots>(count, rows.vectors, [&](i64 j) { return at[j]; }, 1, query, kLanes, units, first, none,
                       [&](i64 j, i64 n, V score) {
                           score *= factor;
                           if (job.softcap > 0) score = bent(score, job.softcap) * kLog2e;
                           if (edge) score = only_seen(job, score, rows.position[n], begin + j);
                           softmax.top[n] = score > softmax.top[n] ? score : softmax.top[n];
                           store(scores + j * kLanes + 16 * n, score);
                       });
        softmax.renew(rows.vectors, sums, width);
        i64 full = units_of(count, kNumbers) * kNumbers;
        for (i64 j = 0; j < count; j += 2)
            for (i64 n = 0; n < rows.vectors; n++) {
                V even = {}, odd = {};
                if (n >= first(j)) {
                    even = exp2(load(scores + j * kLanes + 16 * n) - softmax.most[n]);
                    if (j + 1 < count) odd = exp2(load(scores + (j + 1) * kLanes + 16 * n) - softmax.most[n]);
                }
                softmax.total[n] += even + odd;
                put_rows<Dots>(weights + 16 * n, j, even, odd);
            }
        side_on<Dots>(count, full, width, [&](i64 j) { return keys.value[j]; }, values, stride);
        multiply<Dots>(width, rows.vectors, [&](i64 d) { return values + d; }, stride, weights, kLanes, full / kNumbers, none, none,
                       [&](i64 d, i64 n, V sum) {
                           float* to = sums + d * kLanes + 16 * n;
                           store(to, load(to) + sum);
                       });
    }
    V factors[kVectors];
    for (i64 n = 0; n < rows.vectors; n++) factors[n] = 1.0f / softmax.total[n];
    put_across<Q>(rows, job.out, sums, width, factors);
    if (job.logs)
        for (i64 r = 0; r < rows.count; r++)
            job.logs[rows.token[r] * job.heads + rows.head[r]] = softmax.most[r / 16][r % 16] + __builtin_log2f(softmax.total[r / 16][r % 16]);
}

template <class Q, class T, bool Dots>
void attend_blocks(const void* args, i64 begin, i64 end) {
    auto& job = *(const Attention*)args;
    for (i64 i = begin; i < end; i++) attend_block<Q, T, Dots>(job, job.blocks[i]);
}

void attention(const Attention& job, int threads) {
    if (job.type == kBFloat16) return run(threads, job.block_count, 1, attend_blocks<bf16, bf16, kDots>, &job);
    bool narrow = job.kv_type == kBFloat16;
    run(threads, job.block_count, 1, narrow ? attend_blocks<float, bf16, false> : attend_blocks<float, float, false>, &job);
}

}  // namespace

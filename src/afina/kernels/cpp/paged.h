// Attention of a few queries a sequence to keys and values that lie in pages: decoding, and short pieces of prompts.
//
//     out[i, h] = sum over k of p[k] V[k]        p = softmax over k of scaling q[i, h] . K[k]
//
// An item is a stretch of one sequence's keys, for one head of keys and all queries of all heads that share it, so that
// keys and values are read once. The scores of sixteen keys are one vector; the softmax goes on as they come (Milakov and
// Gimelshein 2018, arXiv 1805.02867), in float32. The stretches of a sequence are put together at the end.
#pragma once
#include "elementwise.h"
#include "lora.h"

namespace {

constexpr float kNever = -3e38f, kLowest = -1e30f;  // a key that is hidden; less than any score

INLINE float peak(V v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < 16; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

#if defined(__AVX512F__)
// half of the vectors: where bit `Half` of a lane is zero it goes on with the first one's sums, else with the second's
template <int Half>
INLINE void fold(V* v) {
#define LANE(i) (((i) & ~Half) + ((i) & Half ? 16 : 0))
#define LANES(o) LANE(0) + o, LANE(1) + o, LANE(2) + o, LANE(3) + o, LANE(4) + o, LANE(5) + o, LANE(6) + o, LANE(7) + o, \
                 LANE(8) + o, LANE(9) + o, LANE(10) + o, LANE(11) + o, LANE(12) + o, LANE(13) + o, LANE(14) + o, LANE(15) + o
    for (int i = 0; i < Half; i++)
        v[i] = __builtin_shufflevector(v[i], v[i + Half], LANES(0)) + __builtin_shufflevector(v[i], v[i + Half], LANES(Half));
#undef LANES
#undef LANE
}
#endif

// the sums of sixteen vectors, which are lost
INLINE V sums_of(V* v) {
#if defined(__AVX512F__)
    fold<8>(v), fold<4>(v), fold<2>(v), fold<1>(v);
    return v[0];
#else
    V made;
    for (int i = 0; i < 16; i++) made[i] = sum(v[i]);
    return made;
#endif
}

// q . K[j] for 16 rows of K, of which `count` are there: the last one stands for those beyond
template <class Rows, class X>
INLINE V scores_of(const Rows& rows, i64 count, const X* q) {
    V found[16] = {};
    i64 full = rows.width / 32;
    for (i64 c = 0; c < full; c++) {
        auto here = Dense<Rows::kDots>::at(q + 32 * c);
        for (int j = 0; j < 16; j++) found[j] = dot(found[j], rows.at(j < count ? j : count - 1, c), here);
    }
    if (rows.width % 32) {
        auto here = Dense<Rows::kDots>::at(q + 32 * full);
        for (int j = 0; j < 16; j++) found[j] = dot(found[j], rows.end(j < count ? j : count - 1, full), here);
    }
    return sums_of(found);
}

struct Running {  // of one row: a query and a head
    V total;      // sum of e^(score - most), in 16 lanes
    float most;   // the largest score so far
};

// the state of a stretch after all its keys: rows of `sums` (width), and for each row the largest score and the total
struct Partial {
    float *sums, *most, *total;
    Partial(float* at, i64 rows, i64 width) : sums(at), most(at + rows * width), total(most + rows) {}
};

INLINE V hidden(V score, i64 first, i64 count, i64 position, i64 window) {
    for (int j = 0; j < 16; j++) {
        i64 key = first + j;
        if (j >= count || key > position || (window && key <= position - window)) score[j] = kNever;
    }
    return score;
}

template <class T>
INLINE void ahead(const T* from, i64 numbers) {
    for (i64 i = 0; i < numbers; i += i64(64 / sizeof(T))) __builtin_prefetch(from + i);
}

template <class T>
struct Sixteen {  // keys and values of up to 16 tokens, which lie in one page
    const T *keys, *values;
    i64 count;
    Sixteen(const Paged& job, const Stretch& s, i64 key) {
        i64 offset = key % job.page_size, page = job.tables[s.sequence * job.table_width + key / job.page_size];
        keys = (const T*)job.kv + page * job.page_stride + (s.head * job.page_size + offset) * job.width;
        values = keys + job.kv_heads * job.page_size * job.width;
        i64 left = job.page_size - offset < s.end - key ? job.page_size - offset : s.end - key;
        count = left < 16 ? left : 16;
    }
};

template <class Q, class T, bool Dots>
void paged_stretch(const Paged& job, const Stretch& s) {
    using X = typename Dense<Dots>::X;
    constexpr bool apart = sizeof(T) != sizeof(X);
    i64 width = job.width, group = job.heads / job.kv_heads, rows = s.queries * group, stride = up(width, 32) * 32;
    X* q = (X*)scratch(kInput, rows * stride * sizeof(X));
    for (i64 i = 0; i < s.queries; i++)
        lay_out<apart>((const Q*)job.query + ((s.query + i) * job.heads + s.head * group) * width, group, width,
                       q + i * group * stride);
    Running* running = (Running*)scratch(kRows, rows * (sizeof(Running) + sizeof(V)));
    V* weights = (V*)(running + rows);
    Partial made(job.partial + s.place, rows, width);
    memset(made.sums, 0, rows * width * sizeof(float));
    for (i64 r = 0; r < rows; r++) running[r] = {V{}, kLowest};
    for (i64 key = s.begin; key < s.end;) {
        Sixteen<T> now(job, s, key);
        i64 next = key + now.count;
        if (next < s.end) {
            Sixteen<T> then(job, s, next);
            ahead(then.keys, then.count * width), ahead(then.values, then.count * width);
        }
        bool edge = now.count < 16 || next > s.past + 1 || (job.window && key <= s.past + s.queries - 1 - job.window);
        Plain<Dots, apart, T> keys{now.keys, width};
        for (i64 r = 0; r < rows; r++) {
            Running& state = running[r];
            V score = scores_of(keys, now.count, q + r * stride) * job.scaling;
            if (job.softcap > 0) score = job.softcap - 2 * job.softcap / (exp(score * (2 / job.softcap)) + 1.0f);  // c tanh(s / c)
            if (edge) score = hidden(score, key, now.count, s.past + r / group, job.window);
            float top = peak(score);
            if (top > state.most) {
                float less = exp(all(state.most - top))[0];
                state.total *= less, state.most = top;
                by_16(width, [&](i64 i, i64 n) {
                    store_n(made.sums + r * width + i, load_n(made.sums + r * width + i, n) * less, n);
                });
            }
            weights[r] = exp(score - state.most);
            state.total += weights[r];
        }
        add_up<T>(rows, 0, width, now.count, [&](i64 r, i64 k) { return ((const float*)(weights + r))[k]; },
                  [&](i64 k) { return now.values + k * width; },
                  [&](i64 r, i64 c, V sum, i64 left) { add_into(made.sums + r * width + c, sum, left); });
        key = next;
    }
    for (i64 r = 0; r < rows; r++) made.most[r] = running[r].most, made.total[r] = sum(running[r].total);
}

template <class Q, class T, bool Dots>
void paged_stretches(const void* args, i64 begin, i64 end) {
    auto& job = *(const Paged*)args;
    for (i64 i = begin; i < end; i++) paged_stretch<Q, T, Dots>(job, job.stretches[i]);
}

// the rows of one head of keys from all stretches of a sequence, which stand `kv_heads` apart
template <class Q>
void paged_join(const void* args, i64 begin, i64 end) {
    auto& job = *(const Paged*)args;
    i64 width = job.width, group = job.heads / job.kv_heads;
    for (i64 item = begin; item < end; item++) {
        i64 head = item % job.kv_heads, first = job.firsts[item / job.kv_heads], last = job.firsts[item / job.kv_heads + 1];
        const Stretch& s = job.stretches[first + head];
        i64 rows = s.queries * group, pieces = (last - first) / job.kv_heads;
        auto partial = [&](i64 p) { return Partial(job.partial + job.stretches[first + p * job.kv_heads + head].place, rows, width); };
        for (i64 r = 0; r < rows; r++) {
            float most = kLowest, total = 0;
            for (i64 p = 0; p < pieces; p++) most = partial(p).most[r] > most ? partial(p).most[r] : most;
            for (i64 p = 0; p < pieces; p++) total += partial(p).total[r] * exp(all(partial(p).most[r] - most))[0];
            Q* out = (Q*)job.out + ((s.query + r / group) * job.heads + head * group + r % group) * width;
            by_16(width, [&](i64 i, i64 n) {
                V sum = {};
                for (i64 p = 0; p < pieces; p++)
                    sum += load_n(partial(p).sums + r * width + i, n) * exp(all(partial(p).most[r] - most));
                store_n(out + i, sum / total, n);
            });
        }
    }
}

void paged(const Paged& job, int threads) {
    i64 heads = job.sequences * job.kv_heads;
    if (job.type == kBFloat16) {
        run(threads, job.stretch_count, 1, paged_stretches<bf16, bf16, kDots>, &job);
        run(threads, heads, 1 + 4096 / job.width, paged_join<bf16>, &job);
    } else {
        bool narrow = job.kv_type == kBFloat16;
        run(threads, job.stretch_count, 1, narrow ? paged_stretches<float, bf16, false> : paged_stretches<float, float, false>, &job);
        run(threads, heads, 1 + 4096 / job.width, paged_join<float>, &job);
    }
}

}  // namespace

// The gradients of attention.h, for sequences without a past.
//
//     dV = p^T dout      ds = p (dout V^T - delta)      dK = scaling ds^T q      dq = scaling ds K
//
// with p made again from the scores and the kept logarithm (Dao et al. 2022, arXiv 2205.14135, algorithm 4). Scores and ds are
// made in float32 and rounded for the products only. There, delta is the sum of dout * out over a row, and out's rounding
// to bfloat16 is most of the error where attention is sharp; here it is the sum of p * (dout V^T), for which both are made
// for all keys of a block first. An item is a piece: some blocks of one sequence and one head of keys, one after another,
// over sums for all keys; the sums of pieces that share keys are put together at the end.
#pragma once
#include "attention.h"

namespace {

// a row of numbers as units: what the product over lanes takes
template <bool Dots>
INLINE void put_row(Unit<Dots>* out, i64 row, i64 n, V x) {
    if constexpr (Dots) store((bf16*)out + row * kLanes + 16 * n, x);
    else store(out + row * kLanes + 16 * n, x);
}

template <bool Dots>
struct Workspace {  // of a block that sees up to `keys` keys
    using U = Unit<Dots>;
    i64 stride, units;
    U *query, *grad, *query_on, *grad_on, *keys_on, *buffer, *weights, *slopes, *slopes_on;
    float *query_sums, *scores, *gains;
    Workspace(i64 width, i64 keys) : stride(units_of(width, 16) * 16), units(units_of(width, UnitOf<Dots>::kNumbers)) {
        i64 square = kChunk * kLanes;
        U* p = (U*)scratch(kRows, sizeof(U) * (kLanes * 7 * stride + 3 * square + 2 * keys * kLanes));
        auto take = [&](i64 count) { return (p += count) - count; };
        query = take(kLanes * stride), grad = take(kLanes * stride), query_on = take(kLanes * stride), grad_on = take(kLanes * stride);
        keys_on = take(kChunk * stride), buffer = take(kChunk * stride), query_sums = (float*)take(kLanes * stride);
        weights = take(square), slopes = take(square), slopes_on = Dots ? take(square) : slopes;
        scores = (float*)take(keys * kLanes), gains = (float*)take(keys * kLanes);
    }
};

template <class T, bool Dots>
struct BackBlock {
    using U = Unit<Dots>;
    static constexpr i64 kNumbers = UnitOf<Dots>::kNumbers;
    const Attention& job;
    const Block& b;
    float *key_sums, *value_sums;
    Rows rows;
    Workspace<Dots> w;
    i64 width, stride, all_rows;
    V logs[kVectors] = {}, delta[kVectors] = {};

    BackBlock(const Attention& job, const Block& b, float* key_sums, float* value_sums)
        : job(job), b(b), key_sums(key_sums), value_sums(value_sums), rows(job, b), w(job.width, rows.last + 1 - b.begin),
          width(job.width), stride(w.stride), all_rows(16 * rows.vectors) {
        auto query = [&](i64 r) { return rows.at<T>(job.query, r); };
        auto grad = [&](i64 r) { return rows.at<T>(job.grad, r); };
        across<Dots>(rows.count, width, query, w.query, kLanes), across<Dots>(rows.count, width, grad, w.grad, kLanes);
        side_on<Dots>(rows.count, all_rows, width, query, w.query_on, stride);
        side_on<Dots>(rows.count, all_rows, width, grad, w.grad_on, stride);
        for (i64 r = 0; r < rows.count; r++) logs[r / 16][r % 16] = job.logs[rows.token[r] * job.heads + rows.head[r]];
        memset(w.query_sums, 0, sizeof(float) * kLanes * width);
        for (i64 k = b.begin; k <= rows.last; k += kChunk) weigh(k, count_at(k));
        for (i64 k = b.begin; k <= rows.last; k += kChunk) add(k, count_at(k));
        V factors[kVectors];
        for (V& f : factors) f = all(job.scaling);
        put_across<T>(rows, job.grad_query, w.query_sums, width, factors);
    }
    i64 count_at(i64 begin) const { return least(kChunk, rows.last + 1 - begin); }

    // of keys begin..begin + count: p in the place of the scores, dout V^T, and their part of delta
    void weigh(i64 begin, i64 count) {
        Keys<T> keys(job, b, begin, count);
        FirstVector first(job, b, rows, begin);
        bool edge = partly_hidden(job, rows, begin, count);
        float factor = job.scaling * kLog2e, *scores = w.scores + (begin - b.begin) * kLanes, *gains = w.gains + (begin - b.begin) * kLanes;
        const U* at[kChunk];
        along<Dots>(count, width, [&](i64 j) { return keys.key[j]; }, w.buffer, stride, at);
        multiply<Dots>(count, rows.vectors, [&](i64 j) { return at[j]; }, 1, w.query, kLanes, w.units, first, none,
                       [&](i64 j, i64 n, V score) {
                           score *= factor;
                           if (edge) score = only_seen(job, score, rows.position[n], begin + j);
                           store(scores + j * kLanes + 16 * n, exp2(score - logs[n]));
                       });
        along<Dots>(count, width, [&](i64 j) { return keys.value[j]; }, w.buffer, stride, at);
        multiply<Dots>(count, rows.vectors, [&](i64 j) { return at[j]; }, 1, w.grad, kLanes, w.units, first, none,
                       [&](i64 j, i64 n, V gain) {
                           store(gains + j * kLanes + 16 * n, gain);
                           delta[n] = fma(gain, load(scores + j * kLanes + 16 * n), delta[n]);
                       });
    }

    // the products of keys begin..begin + count
    void add(i64 begin, i64 count) {
        Keys<T> keys(job, b, begin, count);
        FirstVector first(job, b, rows, begin);
        const float *scores = w.scores + (begin - b.begin) * kLanes, *gains = w.gains + (begin - b.begin) * kLanes;
        for (i64 j = 0; j < count; j += 2)
            for (i64 n = 0; n < rows.vectors; n++) {
                V slope[2] = {};
                for (i64 i = 0; i < 2; i++) {
                    V weight = {};
                    i64 from = (j + i) * kLanes + 16 * n;
                    if (n >= first(j) && j + i < count) {
                        weight = load(scores + from);
                        slope[i] = weight * (load(gains + from) - delta[n]);
                    }
                    put_row<Dots>(w.weights, j + i, n, weight);
                    put_row<Dots>(w.slopes, j + i, n, slope[i]);
                }
                if (Dots) put_rows<Dots>(w.slopes_on + 16 * n, j, slope[0], slope[1]);
            }
        i64 full = units_of(count, kNumbers) * kNumbers;
        side_on<Dots>(count, full, width, [&](i64 j) { return keys.key[j]; }, w.keys_on, stride);
        auto add_to = [](float* to, V sum) { store(to, load(to) + sum); };
        multiply<Dots>(width, rows.vectors, [&](i64 d) { return w.keys_on + d; }, stride, w.slopes_on, kLanes, full / kNumbers, none,
                       none, [&](i64 d, i64 n, V sum) { add_to(w.query_sums + d * kLanes + 16 * n, sum); });
        auto start = [&](i64 j) { return first(j) * 16 / kNumbers; };
        auto lanes = [&](const U* numbers) { return [=](i64 j) { return numbers + j * kLanes / kNumbers; }; };
        auto into = [&](float* sums) {
            return [=](i64 j, i64 n, V sum) { add_to(sums + (begin + j) * stride + 16 * n, sum); };
        };
        multiply<Dots>(count, stride / 16, lanes(w.weights), 1, w.grad_on, stride, all_rows / kNumbers, none, start, into(value_sums));
        multiply<Dots>(count, stride / 16, lanes(w.slopes), 1, w.query_on, stride, all_rows / kNumbers, none, start, into(key_sums));
    }
};

// sums of keys and values, from `shares` places, to the gradients
template <class T>
void give_keys(const Attention& job, const Piece& p, const float* const* sums, i64 shares) {
    i64 stride = units_of(job.width, 16) * 16;
    for (i64 side = 0; side < 2; side++) {
        const Strided& to = side ? job.grad_value : job.grad_key;
        for (i64 k = 0; k < p.tokens; k++)
            by_16(job.width, [&](i64 d, i64 n) {
                V sum = {};
                for (i64 s = 0; s < shares; s++) sum += load(sums[s] + (side * p.tokens + k) * stride + d);
                store_n((T*)to.at + (p.token + k) * to.token + p.head * to.head + d, side ? sum : sum * job.scaling, n);
            });
    }
}

template <class T, bool Dots>
void back_pieces(const void* args, i64 begin, i64 end) {
    auto& job = *(const Attention*)args;
    i64 stride = units_of(job.width, 16) * 16;
    for (i64 i = begin; i < end; i++) {
        const Piece& p = job.pieces[i];
        i64 numbers = 2 * p.tokens * stride;
        float* sums = job.partial ? job.partial + p.place : (float*)scratch(kFactors, sizeof(float) * numbers);
        memset(sums, 0, sizeof(float) * numbers);
        for (i64 k = p.first; k < p.last; k++) BackBlock<T, Dots>(job, job.blocks[k], sums, sums + p.tokens * stride);
        if (!job.partial) give_keys<T>(job, p, &sums, 1);
    }
}

template <class T>
void join_pieces(const void* args, i64 begin, i64 end) {
    auto& job = *(const Attention*)args;
    const float* sums[kMostShares];
    for (i64 i = begin; i < end; i++) {
        const Piece* pieces = job.pieces + i * job.shares;
        for (i64 s = 0; s < job.shares; s++) sums[s] = job.partial + pieces[s].place;
        give_keys<T>(job, *pieces, sums, job.shares);
    }
}

void attention_backward(const Attention& job, int threads) {
    bool narrow = job.type == kBFloat16;
    run(threads, job.piece_count, 1, narrow ? back_pieces<bf16, kDots> : back_pieces<float, false>, &job);
    if (job.partial) run(threads, job.piece_count / job.shares, 1, narrow ? join_pieces<bf16> : join_pieces<float>, &job);
}

}  // namespace

// MoRA's part of a layer, that of all adapters in one call (../mora.py says what the operators are): for each segment
//
//     y[rows]      += w unfold(z)        z    = low M^T       low = fold(x[rows])
//     grad_x[rows] += unfold'(thin M)    thin = fold'(w grad[rows])          grad_M = sum of thin^T low
//
// fold makes of a row the vectors that M takes, unfold a row of vectors; fold' and unfold' are their transposes, which are
// the same two functions with inputs and outputs changed over. All products are one: of numbers of 32 bits, which are a
// float, or two bfloat16 side by side where the machine multiplies these.
#pragma once
#include "lora.h"

namespace {

template <bool Dots>
constexpr i64 kPanelWidth = Dots ? 2 : 1;  // numbers in 32 bits

template <class T>
INLINE void widen_row(const T* from, i64 count, i64 filled, float weight, float* to) {  // writes up to 16 beyond `filled`
    i64 i = 0;
    for (; i + 16 <= count; i += 16) store(to + i, load(from + i) * weight);
    if (i < count) store(to + i, load_part(from + i, count - i) * weight), i += 16;
    for (; i < filled; i += 16) store(to + i, V{});
}

template <class T>
INLINE void add_row(const float* from, i64 count, float weight, T* to) {
    i64 i = 0;
    for (; i + 16 <= count; i += 16) store(to + i, fma(load(from + i), all(weight), load(to + i)));
    if (i < count) store_part(to + i, fma(load_part(from + i, count - i), all(weight), load_part(to + i, count - i)), count - i);
}

// 0, 16, .. below n, the last one moved back where it would pass n: what is written twice is the same both times
INLINE i64 following(i64 j, i64 n) { return j + 32 <= n || j + 16 >= n ? j + 16 : n - 16; }

// `slots` vectors of `size` numbers, `stride` apart, from a row that is filled up to whole blocks; may write 16 beyond
template <class X>
INLINE void fold(const MoRALayout& s, i64 width, const float* cos, const float* sin, const float* row, X* to, i64 stride) {
    if (s.runs) {
        i64 run = width / s.size, longer = width % s.size;
        for (i64 j = 0; j < s.size; j++) {
            float sum = 0;
            for (i64 end = run + (j < longer); end > 0; end--) sum += *row++;
            store1(to + j, sum);
        }
    } else {
        i64 blocks = up(width, s.size), half = cos ? s.size / 2 : s.size;
        for (i64 p = 0; p < s.slots; p++)
            for (i64 j = 0; j < half; j = following(j, half)) {
                V first{}, second{};
                for (i64 block = p; block < blocks; block += s.slots) {
                    const float* at = row + block * s.size + j;
                    if (cos) {
                        V a = load(at), b = load(at + half), c = load(cos + block * half + j), d = load(sin + block * half + j);
                        first += a * c - b * d, second += a * d + b * c;
                    } else first += load(at);
                }
                store(to + p * stride + j, first);
                if (cos) store(to + p * stride + half + j, second);
            }
    }
    if (stride > s.size)
        for (i64 p = 0; p < s.slots; p++) store1(to + p * stride + s.size, 0.0f);
}

// y += weight * the row that the vectors z (slots, size) make; `row` is room for it
template <class T>
INLINE void unfold(const MoRALayout& s, i64 width, const float* cos, const float* sin, const float* z, float weight, float* row,
                   T* y) {
    if (s.runs) {
        i64 run = width / s.size, longer = width % s.size;
        for (i64 j = 0, i = 0; j < s.size; j++)
            for (i64 end = i + run + (j < longer); i < end; i++) row[i] = z[j];
        return add_row(row, width, weight, y);
    }
    if (!cos) {
        i64 whole = s.slots * s.size;
        for (i64 i = 0; i < width; i += whole) add_row(z, width - i < whole ? width - i : whole, weight, y + i);
        return;
    }
    i64 blocks = up(width, s.size), half = s.size / 2;
    for (i64 block = 0; block < blocks; block++)
        for (i64 j = 0; j < half; j = following(j, half)) {
            const float* at = z + block % s.slots * s.size + j;
            V a = load(at), b = load(at + half), c = load(cos + block * half + j), d = load(sin + block * half + j);
            store(row + block * s.size + j, a * c + b * d);
            store(row + block * s.size + half + j, b * c - a * d);
        }
    add_row(row, width, weight, y);
}

// out[i, c] (+)= sum over k of factors[i across + k along] b[k, c]: R rows, C vectors of columns
template <bool Dots, int R, int C>
INLINE void block(i64 count, const uint32_t* factors, i64 across, i64 along, const uint32_t* b, i64 stride, float* out,
                  i64 width, bool add) {
    V sums[R][C];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) sums[i][j] = add ? load(out + i * width + 16 * j) : V{};
    for (i64 k = 0; k < count; k++) {
        V w[C];
        for (int j = 0; j < C; j++) w[j] = load((const float*)(b + k * stride + 16 * j));
        for (int i = 0; i < R; i++) {
            const uint32_t* factor = factors + i * across + k * along;
#if defined(__AVX512BF16__)
            if constexpr (Dots) {
                W32 both = (W32)_mm512_set1_epi32(int(*factor));
                for (int j = 0; j < C; j++) sums[i][j] = dot(sums[i][j], (W32)w[j], both);
                continue;
            }
#endif
            V one = all(read<float>(factor));
            for (int j = 0; j < C; j++) sums[i][j] = fma(one, w[j], sums[i][j]);
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) store(out + i * width + 16 * j, sums[i][j]);
}

template <bool Dots, int R, int C>
void blocks(i64 rows, i64 count, const uint32_t* factors, i64 across, i64 along, const uint32_t* b, i64 stride, float* out,
            i64 width, bool add) {
    for (; rows >= R; rows -= R, factors += R * across, out += R * width)
        block<Dots, R, C>(count, factors, across, along, b, stride, out, width, add);
    if constexpr (R > 1)
        if (rows) blocks<Dots, R - 1, C>(rows, count, factors, across, along, b, stride, out, width, add);
}

// the same over all rows and `width` columns; a last vector that is not full is moved back, or reads and writes beyond
template <bool Dots>
void multiply(i64 rows, i64 count, const uint32_t* factors, i64 across, i64 along, const uint32_t* b, i64 stride, float* out,
              i64 width, bool add) {
    for (i64 c = 0; c < width;) {
        if (c + 16 > width && width >= 16) c = width - 16;
        if (width - c >= 16 * kSumC) {
            blocks<Dots, kSumR, kSumC>(rows, count, factors, across, along, b + c, stride, out + c, width, add);
            c += 16 * kSumC;
        } else if (width - c >= 32) {
            blocks<Dots, kSumR, 2>(rows, count, factors, across, along, b + c, stride, out + c, width, add);
            c += 32;
        } else {
            blocks<Dots, kSumR, 1>(rows, count, factors, across, along, b + c, stride, out + c, width, add);
            c += 16;
        }
    }
}

// rows of X as 32 bits a number: floats as they are; of bfloat16 rows 2i and 2i + 1 side by side, a missing one zero
INLINE void pack_panel(const float* from, i64 rows, i64 stride, i64 size, uint32_t* to) {
    for (i64 i = 0; i < rows; i++) memcpy(to + i * size, from + i * stride, size * sizeof(float));
}
INLINE void pack_panel(const bf16* from, i64 rows, i64 stride, i64 size, uint32_t* to) {
    for (i64 i = 0; i < rows; i += 2, to += size) {
        const uint16_t *low = &from[i * stride].bits, *high = i + 1 < rows ? low + stride : nullptr;
        if (high)
            for (i64 c = 0; c < size; c++) to[c] = low[c] | uint32_t(high[c]) << 16;
        else
            for (i64 c = 0; c < size; c++) to[c] = low[c];
    }
}

// M (size, size), or its transpose, rounded to the type of x, as the products want it
template <class T, bool Dots>
void mora_units(const Units& job) {
    using X = typename Dense<Dots>::X;
    i64 size = job.size;
    X* rows = (X*)scratch(kInput, size * size * sizeof(X));
    for (i64 i = 0; i < size; i++)
        for (i64 j = 0; j < size; j++) {
            T rounded;
            store1(&rounded, job.m[job.transposed ? j * size + i : i * size + j]);
            if constexpr (sizeof(T) == sizeof(X)) rows[i * size + j] = rounded;
            else rows[i * size + j] = load1(&rounded);
        }
    pack_panel(rows, size, size, size, job.out);
}

template <class X>
struct Room {  // of this thread, for a part
    X* low;      // (rows, slots, stride)
    float *z, *row;
    i64 stride;
    Room(const MoRAJob& job, const MoRALayout& s, i64 rows) {
        stride = up(s.size, kPanelWidth<sizeof(X) == 2>) * kPanelWidth<sizeof(X) == 2>;
        low = (X*)scratch(kInput, (rows * s.slots * stride + 32) * sizeof(X));
        z = (float*)scratch(kRows, (rows * s.slots * s.size + 32) * sizeof(float));
        row = (float*)scratch(kFactors, ((job.in > job.out ? job.in : job.out) + s.size + 64) * sizeof(float));
    }
};

// what M, or its transpose, takes: fold of the rows of `from`
template <class T, class X>
INLINE void take(const MoRALayout& s, const Part& part, const T* from, i64 width, i64 reach, const float* cos, const float* sin,
                 float weight, const Room<X>& room) {
    for (i64 t = 0; t < part.end - part.start; t++) {
        widen_row(from + (part.start + t) * width, reach, up(reach, s.size) * s.size, weight, room.row);
        fold(s, reach, cos, sin, room.row, room.low + t * s.slots * room.stride, room.stride);
    }
}

// the product with M, and unfold of that into the rows of `to`
template <class T, bool Dots, class X>
INLINE void give(const MoRALayout& s, const Part& part, T* to, i64 width, i64 reach, const float* cos, const float* sin,
                 float weight, const Room<X>& room) {
    i64 rows = part.end - part.start, across = room.stride / kPanelWidth<Dots>;
    multiply<Dots>(rows * s.slots, across, (const uint32_t*)room.low, across, 1, s.units, s.size, room.z, s.size, false);
    for (i64 t = 0; t < rows; t++)
        unfold(s, reach, cos, sin, room.z + t * s.slots * s.size, weight, room.row, to + (part.start + t) * width);
}

template <class T, bool Dots>
void mora_tiles(const void* args, i64 begin, i64 end) {
    auto& job = *(const MoRAJob*)args;
    for (i64 n = job.tiles[begin]; n < job.tiles[end]; n++) {
        const Part& part = job.parts[job.order[n]];
        const MoRALayout& s = job.layouts[part.adapter];
        Room<typename Dense<Dots>::X> room(job, s, part.end - part.start);
        take(s, part, (const T*)job.x, job.in, s.reads, s.cos, s.sin, 1.0f, room);
        give<T, Dots>(s, part, (T*)job.y, job.out, s.writes, nullptr, nullptr, part.weight, room);
    }
}

// the gradient of x, and what that of M is made of; `low` is made again, which is cheaper than keeping it
template <class T, bool Dots>
void mora_tiles_back(const void* args, i64 begin, i64 end) {
    auto& job = *(const MoRAJob*)args;
    for (i64 n = job.tiles[begin]; n < job.tiles[end]; n++) {
        i64 i = job.order[n];
        const Part& part = job.parts[i];
        const MoRALayout& s = job.layouts[part.adapter];
        i64 rows = (part.end - part.start) * s.slots;
        Room<typename Dense<Dots>::X> room(job, s, part.end - part.start);
        take(s, part, (const T*)job.x, job.in, s.reads, s.cos, s.sin, 1.0f, room);
        pack_panel(room.low, rows, room.stride, s.size, job.low + job.places[i]);
        take(s, part, (const T*)job.grad, job.out, s.writes, nullptr, nullptr, part.weight, room);
        pack_panel(room.low, rows, room.stride, s.size, job.thin + job.places[i]);
        if (job.grad_x) give<T, Dots>(s, part, (T*)job.grad_x, job.in, s.reads, s.cos, s.sin, 1.0f, room);
    }
}

constexpr i64 kGradientRows = 32;  // of the gradient of M, an item
constexpr i64 kDeep = 256;         // sums at a time: what they read stays in the cache while all rows of the item pass

template <bool Dots>
void mora_gradients(const void* args, i64 begin, i64 end) {
    auto& job = *(const MoRAJob*)args;
    for (i64 item = begin; item < end; item++) {
        i64 k = item / job.strips, first = item % job.strips * kGradientRows;
        const MoRALayout& s = job.layouts[k];
        if (first >= s.size) continue;
        i64 rows = s.size - first < kGradientRows ? s.size - first : kGradientRows, width = up(s.size, 16) * 16;
        float* sums = (float*)scratch(kRows, rows * width * sizeof(float));
        memset(sums, 0, rows * width * sizeof(float));
        const uint32_t *low = job.low + job.begins[k], *thin = job.thin + job.begins[k] + first;
        i64 count = (job.begins[k + 1] - job.begins[k]) / s.size;
        for (i64 at = 0; at < count; at += kDeep)
            multiply<Dots>(rows, count - at < kDeep ? count - at : kDeep, thin + at * s.size, 1, s.size, low + at * s.size,
                           s.size, sums, width, true);
        for (i64 i = 0; i < rows; i++) memcpy(s.grad + (first + i) * s.size, sums + i * width, s.size * sizeof(float));
    }
}

i64 mora_tiles_worth(const MoRAJob& job) {
    i64 numbers = 1;
    for (i64 n = 0; n < job.tiles[job.tile_count]; n++) {
        const Part& part = job.parts[n];
        const MoRALayout& s = job.layouts[part.adapter];
        numbers += (part.end - part.start) * s.slots * s.size * s.size;
    }
    return 1 + kWorth * job.tile_count / numbers;
}

void mora(const MoRAJob& job, int threads) {
    run(threads, job.tile_count, mora_tiles_worth(job),
        job.type == kFloat32 ? mora_tiles<float, false> : mora_tiles<bf16, kDots>, &job);
}

void mora_backward(const MoRAJob& job, int threads) {
    bool wide = job.type == kFloat32;
    run(threads, job.tile_count, 1, wide ? mora_tiles_back<float, false> : mora_tiles_back<bf16, kDots>, &job);
    run(threads, job.adapters * job.strips, 1, wide ? mora_gradients<false> : mora_gradients<kDots>, &job);
}

void units(const Units& job) {
    if (job.type == kFloat32) mora_units<float, false>(job);
    else mora_units<bf16, kDots>(job);
}

}  // namespace

// The Python module afina.kernels._native: the best table of kernels for this machine, over plain pointers.
//
// Addresses come as whole numbers (Tensor.data_ptr()); ../native.py sees to it that shapes, types and strides are right.
// The interpreter's lock is given back while a kernel runs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace nb = nanobind;
using Address = uintptr_t;
using Addresses = std::vector<Address>;

extern const Table table_plain;
#if defined(AFINA_X86)
extern const Table table_avx2, table_avx512, table_avx512bf16;
#endif

namespace {

// from the best to the plainest
std::vector<const Table*> usable() {
    std::vector<const Table*> found;
#if defined(AFINA_X86)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&table_avx512bf16);
    if (avx512) found.push_back(&table_avx512);
    if (avx2) found.push_back(&table_avx2);
#endif
    found.push_back(&table_plain);
    return found;
}

const Table* kernels = usable().front();

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (auto* table : usable()) names.push_back(table->name);
    return names;
}

void use(const std::string& name) {
    for (auto* table : usable())
        if (table->name == name) {
            kernels = table;
            return;
        }
    throw std::invalid_argument("this machine has no instruction set called " + name);
}

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

NF4 nf4(Address codes, Address scales, Address superscales, Address offset, Address levels8, i64 rows, i64 width) {
    return {at<uint8_t>(codes), at<uint8_t>(scales), at<float>(superscales), at<float>(offset), at<float>(levels8), rows, width};
}

constexpr i64 kGrain = 16384;        // numbers a piece at least: a few microseconds, what waking a thread costs
constexpr i64 kStreamed = 64 << 20;  // bytes that no cache holds until they are read again

i64 rows_of(i64 numbers, i64 width) { return 1 + numbers / (width > 0 ? width : 1); }

void dequantize(int threads, const NF4& weight, int type, Address out) {
    i64 bytes = weight.rows * weight.width * (type == kFloat32 ? 4 : 2);
    bool stream = bytes >= kStreamed && out % 64 == 0 && weight.width % 32 == 0;
    Dequantize job{weight, Type(type), at<void>(out), stream};
    run(threads, weight.rows, rows_of(kGrain, weight.width), kernels->dequantize, &job);
}

void quantize(int threads, Address weight, int type, i64 rows, i64 width, Address codes, Address absmax) {
    Quantize job{at<void>(weight), Type(type), rows, width, at<uint8_t>(codes), at<float>(absmax)};
    run(threads, rows, rows_of(kGrain / 4, width), kernels->quantize, &job);
}

Eight eight(const std::vector<Address>& a) {
    return {at<uint8_t>(a[0]), at<float>(a[1]), at<float>(a[2]), at<float>(a[3]), at<uint8_t>(a[4])};
}

// `first` and `second`: addresses of codes, scales, levels, middles and starts
void adamw8(int threads, Address value, int type, Address grad, int grad_type, i64 count, const Addresses& first,
            const Addresses& second, float weight1, float beta2, float weight2, float correction2, float eps, float decay,
            float rate) {
    AdamW8 job{at<void>(value), at<void>(grad),  Type(type), Type(grad_type), count, eight(first), eight(second),
               weight1,         beta2,           weight2,    correction2,     eps,   decay,        rate};
    run(threads, (count + kEightBlock - 1) / kEightBlock, kGrain / kEightBlock / 4, kernels->adamw8, &job);
}

void product(int threads, Address x, int type, i64 m, i64 k, i64 n, Address w, Address bias, Address y) {
    kernels->product({at<void>(x), Type(type), m, k, n, at<void>(w), {}, at<void>(bias), at<void>(y)}, threads);
}

void product_float32(int threads, Address x, int type, i64 m, i64 k, i64 n, Address w, Address bias, Address y) {
    kernels->product({at<void>(x), Type(type), m, k, n, at<void>(w), {}, at<void>(bias), at<void>(y), true}, threads);
}

void nf4_product(int threads, Address x, int type, i64 m, const NF4& weight, Address bias, Address y) {
    Product job{at<void>(x), Type(type), m, weight.width, weight.rows, nullptr, weight, at<void>(bias), at<void>(y)};
    kernels->product(job, threads);
}

void norm(int threads, Address x, Address weight, Address grad, Address out, int type, i64 rows, i64 width, float eps) {
    Norm job{at<void>(x), at<void>(weight), at<void>(grad), at<void>(out), Type(type), rows, width, eps};
    run(threads, rows, rows_of(kGrain, width), grad ? kernels->norm_backward : kernels->norm, &job);
}

void swiglu(int threads, Address gate, Address up, Address grad, Address y, Address grad_gate, Address grad_up, int type, i64 count) {
    SwiGLU job{at<void>(gate), at<void>(up), at<void>(grad), at<void>(y), at<void>(grad_gate), at<void>(grad_up), Type(type), count};
    run(threads, count, kGrain / 2, grad ? kernels->swiglu_backward : kernels->swiglu, &job);
}

void rotary(int threads, Address x, Address cos, Address sin, Address y, int type, i64 tokens, i64 heads, i64 width, bool back) {
    Rotary job{at<void>(x), at<void>(cos), at<void>(sin), at<void>(y), Type(type), tokens, heads, width, back};
    run(threads, tokens, rows_of(kGrain, heads * width), kernels->rotary, &job);
}

struct Table3 {  // (segments, 3): start, end, adapter, in the order of the adapters; and a weight each
    const i64* rows;
    const float* weights;
    i64 count;
};

struct Cut {  // segments cut at the borders of tiles of the run
    std::vector<Part> parts;
    std::vector<i64> firsts, places, order, tiles;
    i64 numbers = 0;  // of all parts together: rows times rank
};

// Tiles of 32 rows stay in the cache between the two products; a short run has smaller ones, so that all threads work.
i64 tile_rows(i64 tokens, int threads) { return std::clamp<i64>(tokens / (4 * threads), 1, 32); }

// `numbers(adapter, rows)` is how many numbers a part needs
template <class Numbers>
Cut cut(const Table3& table, i64 tokens, i64 tile, i64 adapters, const Numbers& numbers) {
    Cut made;
    std::vector<std::vector<i64>> by_tile((tokens + tile - 1) / tile);
    for (i64 s = 0; s < table.count; s++) {
        i64 start = table.rows[3 * s], end = table.rows[3 * s + 1], adapter = table.rows[3 * s + 2];
        while (i64(made.firsts.size()) <= adapter) made.firsts.push_back(i64(made.parts.size()));
        for (i64 last; start < end; start = last) {
            last = std::min(end, (start / tile + 1) * tile);
            by_tile[start / tile].push_back(i64(made.parts.size()));
            made.parts.push_back({start, last, adapter, table.weights[s]});
            made.places.push_back(made.numbers);
            made.numbers += numbers(adapter, last - start);
        }
    }
    while (i64(made.firsts.size()) <= adapters) made.firsts.push_back(i64(made.parts.size()));
    for (auto& parts : by_tile) {
        made.tiles.push_back(i64(made.order.size()));
        made.order.insert(made.order.end(), parts.begin(), parts.end());
    }
    made.tiles.push_back(i64(made.order.size()));
    return made;
}

Cut cut(const Table3& table, i64 tokens, i64 tile, const std::vector<i64>& ranks) {
    return cut(table, tokens, tile, i64(ranks.size()), [&](i64 adapter, i64 rows) { return rows * ranks[adapter]; });
}

template <class T>
T* const* pointers(const Addresses& addresses) {
    return reinterpret_cast<T* const*>(addresses.data());
}

LoRAJob made(const Cut& c, int type, i64 in, i64 out, const std::vector<i64>& ranks, const Addresses& a, const Addresses& bt) {
    return {Type(type), in, out, c.parts.data(), c.order.data(), c.tiles.data(), i64(c.tiles.size()) - 1, c.firsts.data(),
            c.places.data(), i64(ranks.size()), ranks.data(), pointers<const void>(a), pointers<const void>(bt)};
}

void lora(int threads, int type, i64 tokens, i64 in, i64 out, Address rows, Address weights, i64 count,
             const std::vector<i64>& ranks, const Addresses& a, const Addresses& bt, Address x, Address y) {
    Cut c = cut({at<i64>(rows), at<float>(weights), count}, tokens, tile_rows(tokens, threads), ranks);
    LoRAJob job = made(c, type, in, out, ranks, a, bt);
    job.x = at<void>(x), job.y = at<void>(y);
    kernels->lora(job, threads);
}

void lora_backward(int threads, int type, i64 tokens, i64 in, i64 out, Address rows, Address weights, i64 count,
                      const std::vector<i64>& ranks, const Addresses& a, const Addresses& bt, Address x, Address grad,
                      Address grad_x, const Addresses& grad_a, const Addresses& grad_bt) {
    Cut c = cut({at<i64>(rows), at<float>(weights), count}, tokens, tile_rows(tokens, threads), ranks);
    std::vector<float> low(c.numbers), thin(c.numbers);
    LoRAJob job = made(c, type, in, out, ranks, a, bt);
    job.x = at<void>(x), job.grad = at<void>(grad), job.grad_x = at<void>(grad_x);
    job.low = low.data(), job.thin = thin.data();
    job.grad_a = pointers<float>(grad_a), job.grad_bt = pointers<float>(grad_bt);
    kernels->lora_backward(job, threads);
}

// A table and its matrices, cut and gathered once: decoding calls it for each layer and token.
struct FusedLoRA {
    Cut c;
    std::vector<i64> ranks;
    Addresses a, bt;
    LoRAJob job;
    FusedLoRA(int threads, int type, i64 tokens, i64 in, i64 out, const std::vector<i64>& rows, const std::vector<float>& weights,
             std::vector<i64> r, Addresses left, Addresses right)
        : c(cut({rows.data(), weights.data(), i64(weights.size())}, tokens, tile_rows(tokens, threads), r)),
          ranks(std::move(r)), a(std::move(left)), bt(std::move(right)), job(made(c, type, in, out, ranks, a, bt)) {}
    FusedLoRA(const FusedLoRA&) = delete;
};

void add(int threads, const FusedLoRA& prepared, Address x, Address y) {
    LoRAJob job = prepared.job;
    job.x = at<void>(x), job.y = at<void>(y);
    kernels->lora(job, threads);
}

// MoRA's table: the fields of a LoRAJob, for MoRA. `forms` has size, num_vectors, num_inputs, num_outputs, is_sharing of each adapter.
struct FusedMoRA {
    std::vector<MoRALayout> layouts;
    Cut c;
    MoRAJob job;
    FusedMoRA(int threads, int type, i64 tokens, i64 in, i64 out, const std::vector<i64>& rows, const std::vector<float>& weights,
         const std::vector<i64>& forms, const Addresses& cos, const Addresses& sin, const Addresses& units) {
        i64 widest = 1;
        for (size_t k = 0; k < cos.size(); k++) {
            const i64* form = forms.data() + 5 * k;
            layouts.push_back({form[0], form[1], form[2], form[3], form[4] != 0, at<float>(cos[k]), at<float>(sin[k]),
                               at<uint32_t>(units[k])});
            widest = std::max(widest, form[0] * form[1]);
        }
        i64 width_of_panel = panel_width(type), tile = std::min(tile_rows(tokens, threads), std::max<i64>(4, kInCache / widest));
        c = cut({rows.data(), weights.data(), i64(weights.size())}, tokens, tile, i64(layouts.size()), [&](i64 k, i64 count) {
            return (count * layouts[k].slots + width_of_panel - 1) / width_of_panel * layouts[k].size;
        });
        job = {Type(type), in, out, c.parts.data(), c.order.data(), c.tiles.data(), i64(c.tiles.size()) - 1, c.places.data(),
               i64(layouts.size()), layouts.data()};
    }
    FusedMoRA(const FusedMoRA&) = delete;
    static i64 panel_width(int type) { return type == kBFloat16 && kernels->dots ? 2 : 1; }
    static constexpr i64 kInCache = 1 << 15;  // numbers that M takes of a tile
};

void mora(int threads, const FusedMoRA& prepared, Address x, Address y) {
    MoRAJob job = prepared.job;
    job.x = at<void>(x), job.y = at<void>(y);
    kernels->mora(job, threads);
}

void mora_backward(int threads, FusedMoRA& prepared, Address x, Address grad, Address grad_x, const Addresses& grads) {
    std::vector<uint32_t> low(prepared.c.numbers + 16), thin(prepared.c.numbers + 16);
    std::vector<i64> begins;
    MoRAJob job = prepared.job;
    i64 largest = 0;
    for (i64 k = 0; k < job.adapters; k++) {
        prepared.layouts[k].grad = at<float>(grads[k]);
        largest = std::max(largest, prepared.layouts[k].size);
        i64 first = prepared.c.firsts[k];
        begins.push_back(first < i64(prepared.c.places.size()) ? prepared.c.places[first] : prepared.c.numbers);
    }
    begins.push_back(prepared.c.numbers);
    job.x = at<void>(x), job.grad = at<void>(grad), job.grad_x = at<void>(grad_x);
    job.low = low.data(), job.thin = thin.data(), job.begins = begins.data(), job.strips = (largest + 31) / 32;
    kernels->mora_backward(job, threads);
}

// M (size, size) float32 as the products want it, into numbers of 32 bits: (ceil(size / panel_width), size) of them
void mora_units(int, Address m, int type, i64 size, bool transposed, Address out) {
    kernels->units({at<float>(m), Type(type), size, transposed, at<uint32_t>(out)});
}

constexpr i64 kShortest = 128;  // keys that are worth an item of their own

// whether keys first..keys of sequence s have pages
void check_pages(const int32_t* tables, i64 table_width, i64 s, i64 first, i64 keys, i64 page_size, i64 pages) {
    if (keys > table_width * page_size) throw std::invalid_argument("a block table has too few blocks for its sequence's keys");
    for (i64 page = first / page_size; page * page_size < keys; page++) {
        i64 there = tables[s * table_width + page];
        if (there < 0 || there >= pages) throw std::invalid_argument("a block table names a block that is not in the pool");
    }
}

void paged(int threads, Address query, int type, Address out, Address kv, int kv_type, i64 pages, i64 page_stride, i64 heads,
           i64 kv_heads, i64 page_size, i64 width, Address tables, i64 table_width, const std::vector<i64>& bounds,
           const std::vector<i64>& pasts, i64 most_queries, float scaling, float softcap, i64 window) {
    std::vector<Stretch> stretches;
    std::vector<i64> firsts{0};
    auto first_key = [&](i64 s) { return window ? std::max<i64>(0, pasts[s] + 1 - window) : 0; };
    i64 work = 0, place = 0;
    for (size_t s = 0; s < pasts.size(); s++) work += (pasts[s] - first_key(s)) * kv_heads;
    i64 span = threads > 1 ? std::max(kShortest, work / (4 * threads)) : work + kv_heads;
    span = (span + page_size - 1) / page_size * page_size;
    for (size_t s = 0; s < pasts.size(); s++) {
        i64 queries = bounds[s + 1] - bounds[s], keys = pasts[s] + queries;
        if (queries <= 0 || queries > most_queries) continue;
        check_pages(at<int32_t>(tables), table_width, i64(s), first_key(s), keys, page_size, pages);
        for (i64 end, begin = first_key(s); begin < keys; begin = end) {
            end = keys - begin < 2 * span ? keys : (begin / page_size) * page_size + span;
            for (i64 head = 0; head < kv_heads; head++) {
                stretches.push_back({i64(s), head, bounds[s], queries, pasts[s], begin, end, place});
                place += queries * (heads / kv_heads) * (width + 2);
            }
        }
        firsts.push_back(i64(stretches.size()));
    }
    std::vector<float> partial(place);
    kernels->paged({at<void>(query), at<void>(kv), at<void>(out), Type(type), Type(kv_type), page_stride, heads, kv_heads,
                    page_size, width, at<int32_t>(tables), table_width, scaling, softcap, window, stretches.data(),
                    i64(stretches.size()), firsts.data(), i64(firsts.size()) - 1, partial.data()}, threads);
}

constexpr i64 kBlockRows = 64;  // as attention.h has it

// the blocks of sequence s, of `queries` after `past` others, for one head of keys
void cut_blocks(std::vector<Block>& blocks, i64 s, i64 head, i64 group, i64 query, i64 queries, i64 past, i64 window) {
    for (i64 row = 0; row < queries * group; row += kBlockRows) {
        i64 rows = std::min(kBlockRows, queries * group - row), first = past + row / group;
        blocks.push_back({s, head, query, past, row, rows, window ? std::max<i64>(0, first + 1 - window) : 0});
    }
}

// the costly ones first, so that threads end together
void costly_first(std::vector<Block>& blocks, i64 group) {
    auto keys = [=](const Block& b) { return b.past + b.row / group - b.begin; };
    std::stable_sort(blocks.begin(), blocks.end(), [=](const Block& a, const Block& b) { return keys(a) > keys(b); });
}

void paged_pieces(int threads, Address query, int type, Address out, Address kv, int kv_type, i64 pages, i64 page_stride, i64 heads,
                  i64 kv_heads, i64 page_size, i64 width, Address tables, i64 table_width, const std::vector<i64>& bounds,
                  const std::vector<i64>& pasts, i64 fewest, float scaling, float softcap, i64 window) {
    std::vector<Block> blocks;
    for (size_t s = 0; s < pasts.size(); s++) {
        i64 queries = bounds[s + 1] - bounds[s];
        if (queries < fewest || queries <= 0) continue;
        check_pages(at<int32_t>(tables), table_width, i64(s), window ? std::max<i64>(0, pasts[s] + 1 - window) : 0,
                    pasts[s] + queries, page_size, pages);
        for (i64 h = 0; h < kv_heads; h++) cut_blocks(blocks, i64(s), h, heads / kv_heads, bounds[s], queries, pasts[s], window);
    }
    costly_first(blocks, heads / kv_heads);
    Attention job{Type(type), Type(kv_type), heads, kv_heads, width, scaling, softcap, window};
    job.query = {at<void>(query), heads * width, width}, job.out = {at<void>(out), heads * width, width};
    job.tables = at<int32_t>(tables), job.paging = {at<void>(kv), page_stride, page_size, table_width};
    job.blocks = blocks.data(), job.block_count = i64(blocks.size());
    kernels->attention(job, threads);
}

using Place = std::tuple<Address, i64, i64>;  // of (T, heads, width): address, and how far tokens and heads are apart
Strided strided(const Place& p) { return {at<void>(std::get<0>(p)), std::get<1>(p), std::get<2>(p)}; }

Attention flat_job(int type, i64 heads, i64 kv_heads, i64 width, float scaling, i64 window, const std::vector<Place>& places, Address logs) {
    Attention job{Type(type), Type(type), heads, kv_heads, width, scaling, 0, window};
    job.query = strided(places[0]), job.key = strided(places[1]), job.value = strided(places[2]);
    job.logs = at<float>(logs);
    return job;
}

// places: query, key, value, out
void attention(int threads, int type, i64 heads, i64 kv_heads, i64 width, const std::vector<i64>& bounds, float scaling, i64 window,
               const std::vector<Place>& places, Address logs) {
    std::vector<Block> blocks;
    for (size_t s = 0; s + 1 < bounds.size(); s++)
        for (i64 h = 0; h < kv_heads; h++)
            cut_blocks(blocks, i64(s), h, heads / kv_heads, bounds[s], bounds[s + 1] - bounds[s], 0, window);
    costly_first(blocks, heads / kv_heads);
    Attention job = flat_job(type, heads, kv_heads, width, scaling, window, places, logs);
    job.out = strided(places[3]);
    job.blocks = blocks.data(), job.block_count = i64(blocks.size());
    kernels->attention(job, threads);
}

// places: query, key, value, grad, and the gradients of query, key and value
void attention_backward(int threads, int type, i64 heads, i64 kv_heads, i64 width, const std::vector<i64>& bounds, float scaling,
                        i64 window, const std::vector<Place>& places, Address logs) {
    i64 pairs = (i64(bounds.size()) - 1) * kv_heads, stride = (width + 15) / 16 * 16, place = 0;
    i64 shares = pairs >= 2 * threads || threads <= 1 ? 1 : std::min((2 * threads + pairs - 1) / std::max<i64>(1, pairs), kMostShares);
    std::vector<Block> blocks;
    std::vector<Piece> pieces;
    for (size_t s = 0; s + 1 < bounds.size(); s++)
        for (i64 h = 0; h < kv_heads; h++) {
            i64 first = i64(blocks.size()), tokens = bounds[s + 1] - bounds[s];
            cut_blocks(blocks, i64(s), h, heads / kv_heads, bounds[s], tokens, 0, window);
            i64 count = i64(blocks.size()) - first;
            for (i64 share = 0; share < shares; share++, place += 2 * tokens * stride) {
                // block i reads about i chunks of keys: equal shares of work end at the square roots
                auto border = [&](i64 k) { return first + i64(double(count) * std::sqrt(double(k) / double(shares)) + 0.5); };
                pieces.push_back({bounds[s], tokens, h, border(share), border(share + 1), place});
            }
        }
    std::vector<float> partial(shares > 1 ? place : 0);
    Attention job = flat_job(type, heads, kv_heads, width, scaling, window, places, logs);
    job.blocks = blocks.data(), job.block_count = i64(blocks.size());
    job.grad = strided(places[3]), job.grad_query = strided(places[4]), job.grad_key = strided(places[5]), job.grad_value = strided(places[6]);
    job.pieces = pieces.data(), job.piece_count = i64(pieces.size()), job.shares = shares, job.partial = shares > 1 ? partial.data() : nullptr;
    kernels->attention_backward(job, threads);
}

// keys and values (tokens, kv_heads, width) of `size` bytes a number to their slots
void paged_write(int, Address key, Address value, i64 size, Address kv, i64 pages, i64 page_stride, i64 tokens, i64 kv_heads,
                 i64 page_size, i64 width, Address slots) {
    i64 bytes = width * size;
    for (i64 t = 0; t < tokens; t++)
        if (at<i64>(slots)[t] < 0 || at<i64>(slots)[t] >= pages * page_size) throw std::invalid_argument("a slot is not in the pool");
    for (i64 t = 0; t < tokens; t++) {
        i64 slot = at<i64>(slots)[t];
        char* to = at<char>(kv) + slot / page_size * page_stride * size + slot % page_size * bytes;
        for (i64 h = 0; h < kv_heads; h++) {
            std::memcpy(to + h * page_size * bytes, at<char>(key) + (t * kv_heads + h) * bytes, bytes);
            std::memcpy(to + (kv_heads + h) * page_size * bytes, at<char>(value) + (t * kv_heads + h) * bytes, bytes);
        }
    }
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // prepared matrices live in caches until the interpreter ends: nothing leaks before
    auto release = nb::call_guard<nb::gil_scoped_release>();
    m.def("isas", isas);
    m.def("isa", [] { return kernels->name; });
    m.def("use", use);
    m.def("threads_of", threads_of);
    nb::class_<NF4>(m, "NF4").def("__init__", [](NF4* self, Address c, Address s, Address ss, Address o, Address l, i64 rows,
                                                 i64 width) { new (self) NF4(nf4(c, s, ss, o, l, rows, width)); });
    m.def("dequantize", dequantize, release);
    m.def("quantize", quantize, release);
    m.def("adamw8", adamw8, release);
    m.def("product", product, release);
    m.def("product_float32", product_float32, release);
    m.def("nf4_product", nf4_product, release);
    m.def("norm", norm, release);
    m.def("swiglu", swiglu, release);
    m.def("rotary", rotary, release);
    m.def("lora", lora, release);
    m.def("lora_backward", lora_backward, release);
    nb::class_<FusedLoRA>(m, "FusedLoRA").def(nb::init<int, int, i64, i64, i64, const std::vector<i64>&, const std::vector<float>&,
                                                     std::vector<i64>, Addresses, Addresses>());
    m.def("add", add, release);
    nb::class_<FusedMoRA>(m, "FusedMoRA").def(nb::init<int, int, i64, i64, i64, const std::vector<i64>&, const std::vector<float>&,
                                             const std::vector<i64>&, const Addresses&, const Addresses&, const Addresses&>());
    m.def("mora", mora, release);
    m.def("mora_backward", mora_backward, release);
    m.def("mora_units", mora_units, release);
    m.def("panel_width", FusedMoRA::panel_width);
    m.def("paged", paged, release);
    m.def("paged_pieces", paged_pieces, release);
    m.def("attention", attention, release);
    m.def("attention_backward", attention_backward, release);
    m.def("paged_write", paged_write, release);
}

// What the kernels take and give. Each kernel is a function over a range of its items (rows, tiles, columns), so that
// one pool (pool.h) spreads them all; each is compiled once for every instruction set (kernels.cpp), and module.cpp
// picks a table of them when it is loaded.
#pragma once
#include <cstdint>

using i64 = int64_t;
enum Type : int { kFloat32 = 0, kBFloat16 = 1 };

constexpr i64 kBlock = 64;        // weights that share an absmax
constexpr i64 kSuperBlock = 256;  // absmax that share a superscale

struct NF4 {  // a matrix (rows, width) in four bits; see ../nf4.py
    const uint8_t* codes;      // (rows, ceil(width / 2))
    const uint8_t* scales;     // (rows, ceil(width / 64))
    const float* superscales;  // (ceil(rows * ceil(width / 64) / 256))
    const float* offset;       // (1)
    const float* levels8;      // (256): what a scale stands for
    i64 rows, width;
};

struct Dequantize {  // items: rows
    NF4 weight;
    Type type;
    void* out;    // (rows, width)
    bool stream;  // write past the caches
};

struct Quantize {  // items: rows
    const void* weight;  // (rows, width)
    Type type;
    i64 rows, width;
    uint8_t* codes;  // (rows, ceil(width / 2))
    float* absmax;   // (rows, ceil(width / 64))
};

struct Product {  // y (m, n) = x (m, k) W^T + bias
    const void* x;
    Type type;  // of x, bias and y, and of W unless it is NF4
    i64 m, k, n;
    const void* w;  // (n, k); null where W is `nf4`
    NF4 nf4;
    const void* bias;  // (n) or null
    void* y;
    bool wide = false;  // y is float32, whatever `type` is
};

struct Part {  // one piece of a segment: rows start..end of the run pass through `adapter`, times `weight`
    i64 start, end, adapter;
    float weight;
};

struct LoRAJob {  // see lora.h
    Type type;  // of x, y, their gradients and the adapters' matrices
    i64 in, out;
    const Part* parts;  // in the order of their adapters
    const i64* order;   // parts by tile of the run: one thread adds all that concerns a row
    const i64* tiles;   // tile i has the parts order[tiles[i]] .. order[tiles[i + 1]]
    i64 tile_count;
    const i64* firsts;  // parts firsts[k] .. firsts[k + 1] are those of adapter k
    const i64* places;  // where a part starts in `low` and `thin`
    i64 adapters;
    const i64* ranks;        // of each adapter
    const void* const* a;    // (r, in) each
    const void* const* bt;   // (r, out) each: B transposed
    float* const* grad_a;    // (r, in) each
    float* const* grad_bt;   // (r, out) each
    const void *x, *grad;    // (T, in), (T, out)
    void *y, *grad_x;        // (T, out), (T, in): added to in place
    float *low, *thin;  // backward: w x A^T and w grad B of every part, (end - start, r) each, one after another
};

struct MoRALayout {  // MoRA's operator of one adapter; see mora.h
    i64 size, slots;         // of M, (size, size); vectors that M takes of a row
    i64 reads, writes;       // inputs and outputs that it has to do with, the first ones
    bool runs;               // groups are runs of neighbours
    const float *cos, *sin;  // (blocks of inputs, size / 2) or null; 16 more can be read
    const uint32_t* units;   // M transposed forward, M backward: see mora_units; 16 more can be read
    float* grad;             // (size, size)
};

struct Units {
    const float* m;  // (size, size)
    Type type;       // to which it is rounded
    i64 size;
    bool transposed;
    uint32_t* out;
};

struct MoRAJob {  // see mora.h; the parts as in LoRAJob
    Type type;
    i64 in, out;
    const Part* parts;
    const i64 *order, *tiles;
    i64 tile_count;
    const i64* places;  // where a part starts in `low` and `thin`
    i64 adapters;
    const MoRALayout* layouts;  // one an adapter
    const void *x, *grad;
    void *y, *grad_x;      // added to in place; grad_x may be null
    const i64* begins;     // backward: where an adapter starts in `low` and `thin`
    i64 strips;            // and how many items the largest gradient is
    uint32_t *low, *thin;  // and what M took, and its transpose, 32 bits a number; 16 more can be read
};

struct Norm {  // items: rows
    const void *x, *weight, *grad;
    void* out;  // y forward, the gradient of x backward
    Type type;
    i64 rows, width;
    float eps;
};

struct SwiGLU {  // items: elements
    const void *gate, *up, *grad;
    void *y, *grad_gate, *grad_up;
    Type type;
    i64 count;
};

struct Rotary {  // items: tokens
    const void *x, *cos, *sin;  // (T, heads, width), (T, width), (T, width)
    void* y;
    Type type;
    i64 tokens, heads, width;
    bool back;  // the transpose
};

struct Stretch {  // keys begin..end of one sequence, for one head of keys and `queries` queries
    i64 sequence, head, query, queries;  // the first query's place in the run, and how many there are
    i64 past;                            // the first query's position in its sequence
    i64 begin, end, place;               // where its result starts in `partial`
};

struct Paged {  // see paged.h
    const void *query, *kv;  // (T, heads, width); page p starts at p * page_stride: (2, kv_heads, page_size, width)
    void* out;               // (T, heads, width)
    Type type, kv_type;      // of query and out; of kv
    i64 page_stride, heads, kv_heads, page_size, width;
    const int32_t* tables;  // (all sequences, table_width): their pages
    i64 table_width;
    float scaling, softcap;  // 0: none
    i64 window;              // 0: none
    const Stretch* stretches;
    i64 stretch_count;
    const i64* firsts;  // sequence i has the stretches firsts[i] .. firsts[i + 1], the heads of one stretch side by side
    i64 sequences;
    float* partial;
};

constexpr i64 kEightBlock = 256;  // numbers of eight bits that share a scale
constexpr int kStartShift = 16;   // bits of a float32 that do not choose where its search starts

struct Eight {  // numbers in eight bits; see ../blockwise.py
    uint8_t* codes;         // (count)
    float* scales;          // (ceil(count / 256))
    const float* levels;    // (256)
    const float* middles;   // (256), the last one infinite
    const uint8_t* starts;  // (2^16): middles below all numbers whose highest 16 bits these are
};

struct AdamW8 {  // items: blocks; see adamw8.h
    void* value;       // (count), stepped in place
    const void* grad;  // (count)
    Type type, grad_type;
    i64 count;
    Eight first, second;
    float weight1, beta2, weight2, correction2, eps, decay, rate;
};

struct Strided {  // (T, heads, width), whose numbers of one head and token lie side by side
    const void* at;
    i64 token, head;  // how far tokens, and heads, are apart
};

struct Block {  // rows row..row + rows of one sequence: row i is query i / group, head i % group of those that share keys
    i64 sequence, head, query, past;  // the head of keys; the first query's place in the run, and its position
    i64 row, rows, begin;             // the first key that one of them sees
};

struct Paging {
    const void* kv;  // as in Paged
    i64 page_stride, page_size, table_width;
};

struct Piece {  // blocks first..last of one sequence and head of keys
    i64 token, tokens, head;  // the sequence's first token, how many it has, and the head of keys
    i64 first, last, place;   // where its sums start in `partial`: (2, tokens, width in whole vectors)
};
constexpr i64 kMostShares = 64;

struct Attention {  // see attention.h
    Type type, kv_type;
    i64 heads, kv_heads, width;
    float scaling, softcap;  // 0: none
    i64 window;              // 0: none
    Strided query, out, key, value;
    const int32_t* tables;  // null where keys and values are strided, and no sequence has a past
    Paging paging;
    float* logs;  // (T, heads): the logarithm to base 2 of the softmax's denominator; or null
    const Block* blocks;
    i64 block_count;
    // backward
    Strided grad, grad_query, grad_key, grad_value;  // the gradients of keys and values are (T, kv_heads, width)
    const Piece* pieces;  // those of one sequence and head side by side
    i64 piece_count, shares;  // into how many pieces the blocks of a sequence and head are cut
    float* partial;  // the sums of all pieces; null where shares is 1
};

using Task = void (*)(const void* args, i64 begin, i64 end);

struct Table {
    const char* name;
    Task dequantize, quantize, norm, norm_backward, swiglu, swiglu_backward, rotary, adamw8;
    void (*product)(const Product&, int threads);
    void (*lora)(const LoRAJob&, int threads);
    void (*lora_backward)(const LoRAJob&, int threads);
    void (*paged)(const Paged&, int threads);
    void (*mora)(const MoRAJob&, int threads);
    void (*mora_backward)(const MoRAJob&, int threads);
    void (*units)(const Units&);
    void (*attention)(const Attention&, int threads);
    void (*attention_backward)(const Attention&, int threads);
    bool dots;  // whether it multiplies bfloat16, two at a time
};

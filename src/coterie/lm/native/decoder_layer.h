// A whole decoder layer without gradients, in float32: the parts of the other files, one after another, by one team of
// threads. With few tokens waking threads for every part, and calling every part, takes as long as some of the parts.

#pragma once

#include "attention.h"
#include "layers.h"
#include "low_rank.h"
#include "products.h"

namespace {

constexpr int64_t MOST_SIBLINGS = 3;

// Layers that read the same input. Their outputs lie side by side; those that have adapters begin at `offset`.
struct Siblings {
    const float *panels, *bias;
    int64_t size, out, adapted, offset[MOST_SIBLINGS], width[MOST_SIBLINGS];
};

// What is the same in every pass.
struct DecoderLayer {
    Siblings asked, mixed, inner, outer;
    const float *before_attention, *before_mlp;
    int64_t kv_heads, group, dim;
    float attention_eps, mlp_eps, scale;
};

// What is the same in every layer. `normed`, `blended`, `gated` are room for (tokens, widest) each, and nobody's after a
// layer; `left` (tokens, hidden) is what a layer leaves to be added.
struct DecoderPass {
    const float *cos, *sin;
    const int64_t* own;
    const int32_t* slots;
    const int64_t* first;
    const int32_t* seen;
    const int64_t* ranks;
    const float* scales;
    const int64_t *starts, *ends;
    float *normed, *blended, *gated, *left;
    int64_t tokens, angle_row, most_seen, pool_head, ranges, most_rank, threads;
};

// Of one layer in one pass. `x` and, unless this is the first layer, what the one before left come in; their sum is written
// to `total`. `factors`: of each of the four groups, addresses of A and then of B of every adapter in every adapted layer.
struct DecoderCall {
    const float* x;
    float *total, *asked, *seen, *middle, *inner, *pool_k, *pool_v;
    const float* const* factors[8];
    int64_t adds;
};

inline void siblings(const Siblings& s, const DecoderPass& pass, const float* x, const float* const* a,
                     const float* const* b, float* y) {
    const int64_t row = s.size;
    product({&x, &row, &row, 1}, s.panels, s.bias, pass.tokens, s.out, y, pass.threads);
    if (!s.adapted || !pass.ranges) return;
    float* outs[MOST_SIBLINGS];
    int64_t rows[MOST_SIBLINGS];
    for (int64_t i = 0; i < s.adapted; i++) outs[i] = y + s.offset[i], rows[i] = s.out;
    add_low_rank<float>(x, s.size, outs, rows, s.width, s.adapted, a, b, pass.ranks, pass.scales, pass.starts, pass.ends,
                        pass.ranges, s.size, pass.most_rank, nullptr, pass.threads);
}

inline void decoder_layer(const DecoderLayer& layer, const DecoderPass& pass, const DecoderCall& call) {
    const int64_t tokens = pass.tokens, hidden = layer.asked.size, heads = layer.kv_heads * layer.group;
    const int64_t row = layer.asked.out, between = layer.inner.out / 2;
    const int threads = pass.threads;
    team(threads, tokens * layer.inner.out > PARALLEL, [=, &layer, &pass, &call] {
        const float* added = call.adds ? pass.left : nullptr;
        const float* x = call.adds ? call.total : call.x;
        rms_norm(call.x, hidden, added, call.total, layer.before_attention, layer.attention_eps, pass.normed, (float*)nullptr,
                 tokens, hidden, threads);
        siblings(layer.asked, pass, pass.normed, call.factors[0], call.factors[1], call.asked);
        const float *q = call.asked, *k = q + heads * layer.dim, *v = k + layer.kv_heads * layer.dim;
        attend(q, row, k, row, v, row, pass.cos, pass.sin, pass.angle_row, call.pool_k, call.pool_v, pass.pool_head, pass.own,
               pass.slots, pass.first, pass.seen, call.seen, tokens, layer.kv_heads, layer.group, layer.dim, layer.scale,
               pass.most_seen, threads);
        siblings(layer.mixed, pass, call.seen, call.factors[2], call.factors[3], pass.blended);
        rms_norm(x, hidden, (const float*)pass.blended, call.middle, layer.before_mlp, layer.mlp_eps, pass.normed,
                 (float*)nullptr, tokens, hidden, threads);
        siblings(layer.inner, pass, pass.normed, call.factors[4], call.factors[5], call.inner);
        swiglu(call.inner, layer.inner.out, call.inner + between, layer.inner.out, pass.gated, tokens, between, threads);
        siblings(layer.outer, pass, pass.gated, call.factors[6], call.factors[7], pass.left);
    });
}

}  // namespace

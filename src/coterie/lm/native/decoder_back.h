// The way back through a whole decoder layer whose activations are known, in float32, by one team of threads: as in
// decoder_layer.h, the parts one after another.

#pragma once

#include "decoder_layer.h"
#include "tree.h"

namespace {

// Rows of numbers, `row` apart, of `width`.
struct Rows {
    const float* data;
    int64_t row, width;
};

// The way back through layers that read the same input of `size`. `panels` are of the transposed matrices, side by side.
struct SiblingsBack {
    const float* panels;
    int64_t size, adapted, place[MOST_SIBLINGS];
};

struct LayerBack {
    SiblingsBack asked, mixed, inner, outer;
    const float *before_attention, *before_mlp;
    int64_t kv_heads, group, dim, between;
    float attention_eps, mlp_eps, scale;
};

// What is the same in every layer. Room is for all tokens: `low` and `low_grad` for MOST_SIBLINGS times the highest rank
// each, `turned` and `attention` for queries, keys and values, `gates` for gate and up, the others for what they are named.
struct PassBack {
    const float *cos, *sin;
    const int32_t* slots;
    const int64_t* first;
    const int32_t* seen;
    const int64_t* ranks;
    const float* scales;
    const int64_t *starts, *ends;
    float *normed, *gated, *grad_gated, *gates, *grad_normed, *middle, *grad_seen, *turned, *attention, *inverse, *low, *low_grad;
    int64_t tokens, angle_row, most_seen, ranges, most_rank, threads;
};

// Of one layer. What was computed is contiguous; `grad` is at what came out of the layer, `to` receives that at x and may be
// null. `factors` as in DecoderCall; `gradients`: of each of the four groups, where those of A and then of B of every adapter
// in every adapted layer are added up, null for adapters that are not trained.
struct CallBack {
    const float *x, *q, *k, *v, *seen, *middle, *gate, *up, *grad;
    float* to;
    const float* const* factors[8];
    float* const* gradients[8];
};

// x is what the layers read, `grads` are at what they made of it; the gradient at x goes to `to`, unless that is null.
inline void siblings_back(const SiblingsBack& s, const PassBack& pass, const float* x, const Rows* grads, int64_t parts,
                          const float* const* a, const float* const* b, float* const* grads_a, float* const* grads_b,
                          float* to) {
    const int threads = pass.threads;
    if (to) {
        const float* data[MOST_SIBLINGS];
        int64_t rows[MOST_SIBLINGS], widths[MOST_SIBLINGS];
        for (int64_t i = 0; i < parts; i++) data[i] = grads[i].data, rows[i] = grads[i].row, widths[i] = grads[i].width;
        product({data, rows, widths, parts}, s.panels, nullptr, pass.tokens, s.size, to, threads);
    }
    if (!s.adapted || !pass.ranges) return;
    // x A^T, and dy B^T with the way back from there
    std::vector<float*> low(s.adapted * pass.ranges), low_grad(s.adapted * pass.ranges);
    for (int64_t i = 0; i < s.adapted; i++)
        for (int64_t r = 0; r < pass.ranges; r++) {
            const int64_t at = (i * pass.tokens + pass.starts[r]) * pass.most_rank;
            low[i * pass.ranges + r] = pass.low + at;
            low_grad[i * pass.ranges + r] = pass.low_grad + at;
        }
    float* nowhere[MOST_SIBLINGS] = {};
    const int64_t nothing[MOST_SIBLINGS] = {};
    add_low_rank<float>(x, s.size, nowhere, nothing, nothing, s.adapted, a, b, pass.ranks, pass.scales, pass.starts, pass.ends,
                        pass.ranges, s.size, pass.most_rank, low.data(), threads);
    std::vector<Outer<float>> jobs;
    for (int64_t i = 0; i < s.adapted; i++) {
        const Rows& grad = grads[s.place[i]];
        const int64_t wide = to ? s.size : 0, first = i * pass.ranges;
        add_low_rank<float>(grad.data, grad.row, &to, &s.size, &wide, 1, b + first, a + first, pass.ranks, pass.scales,
                            pass.starts, pass.ends, pass.ranges, grad.width, pass.most_rank, low_grad.data() + first, threads);
        for (int64_t r = 0; r < pass.ranges; r++) {
            if (!grads_a[first + r]) continue;
            const int64_t start = pass.starts[r], tokens = pass.ends[r] - start, rank = pass.ranks[r];
            jobs.push_back({low_grad[first + r], x + start * s.size, grads_a[first + r], rank, s.size, tokens, s.size, 0,
                            pass.scales[r]});
            jobs.push_back({low[first + r], grad.data + start * grad.row, grads_b[first + r], rank, grad.row, tokens, grad.width,
                            1, pass.scales[r]});
        }
    }
    outer(jobs.data(), jobs.size(), threads);
}

inline void decoder_layer_back(const LayerBack& layer, const PassBack& pass, const CallBack& call) {
    const int64_t tokens = pass.tokens, hidden = layer.asked.size, between = layer.between, dim = layer.dim;
    const int64_t kv = layer.kv_heads * dim, wide = kv * layer.group;
    const int threads = pass.threads;
    const Seen see{pass.slots, pass.first, pass.seen, tokens, pass.most_seen};
    const TreeWork work(see, layer.kv_heads * layer.group);
    float *turned_q = pass.turned, *turned_k = turned_q + tokens * wide;
    float *grad_q = pass.attention, *grad_k = grad_q + tokens * wide, *grad_v = grad_k + tokens * kv;
    const Heads heads{turned_q, wide, turned_k, kv, call.v, kv, layer.kv_heads, layer.group, dim, layer.scale};
    team(threads, tokens * between > PARALLEL, [=, &layer, &pass, &call, &work] {
        // what follows attention
        rms_norm(call.middle, hidden, (const float*)nullptr, (float*)nullptr, layer.before_mlp, layer.mlp_eps, pass.normed,
                 pass.inverse, tokens, hidden, threads);
        swiglu(call.gate, between, call.up, between, pass.gated, tokens, between, threads);
        const Rows out{call.grad, hidden, hidden};
        siblings_back(layer.outer, pass, pass.gated, &out, 1, call.factors[6], call.factors[7], call.gradients[6],
                      call.gradients[7], pass.grad_gated);
        float *grad_gate = pass.gates, *grad_up = grad_gate + tokens * between;
        swiglu_backward((const float*)pass.grad_gated, call.gate, between, call.up, between, grad_gate, grad_up, tokens, between,
                        threads);
        const Rows inner[2] = {{grad_gate, between, between}, {grad_up, between, between}};
        siblings_back(layer.inner, pass, pass.normed, inner, 2, call.factors[4], call.factors[5], call.gradients[4],
                      call.gradients[5], pass.grad_normed);
        rms_norm_backward((const float*)pass.grad_normed, call.middle, hidden, layer.before_mlp, pass.inverse, call.grad,
                          pass.middle, tokens, hidden, threads);
        // attention
        rotate(call.q, wide, turned_q, pass.cos, pass.sin, pass.angle_row, 1.0f, tokens, wide / dim, dim, threads);
        rotate(call.k, kv, turned_k, pass.cos, pass.sin, pass.angle_row, 1.0f, tokens, kv / dim, dim, threads);
        const Rows mixed{pass.middle, hidden, hidden};
        siblings_back(layer.mixed, pass, call.seen, &mixed, 1, call.factors[2], call.factors[3], call.gradients[2],
                      call.gradients[3], pass.grad_seen);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            std::fill(grad_k + t * kv, grad_k + (t + 1) * kv, 0.0f);
            std::fill(grad_v + t * kv, grad_v + (t + 1) * kv, 0.0f);
        }
        attend_tree_backward(heads, see, work, pass.grad_seen, call.seen, grad_q, grad_k, grad_v, threads);
        rotate((const float*)grad_q, wide, turned_q, pass.cos, pass.sin, pass.angle_row, -1.0f, tokens, wide / dim, dim, threads);
        rotate((const float*)grad_k, kv, turned_k, pass.cos, pass.sin, pass.angle_row, -1.0f, tokens, kv / dim, dim, threads);
        // what is before it
        rms_norm(call.x, hidden, (const float*)nullptr, (float*)nullptr, layer.before_attention, layer.attention_eps, pass.normed,
                 pass.inverse, tokens, hidden, threads);
        const Rows asked[3] = {{turned_q, wide, wide}, {turned_k, kv, kv}, {grad_v, kv, kv}};
        siblings_back(layer.asked, pass, pass.normed, asked, 3, call.factors[0], call.factors[1], call.gradients[0],
                      call.gradients[1], call.to ? pass.grad_normed : nullptr);
        if (call.to)
            rms_norm_backward((const float*)pass.grad_normed, call.x, hidden, layer.before_attention, pass.inverse, pass.middle,
                              call.to, tokens, hidden, threads);
    });
}

}  // namespace

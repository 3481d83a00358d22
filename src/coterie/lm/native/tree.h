// Attention within a pass of the learner, token by token: nothing that a token does not see is computed or masked.
//
// With P the probabilities, O = P v:  dv = P^T dO,  dS = P (dO v^T - rowsum(dO O)) scale,  dq = dS k,  dk = dS^T q
// (Dao et al., 2022). On the way back a stretch of tokens at a time first has its P and dS computed, shared out by token;
// then dk and dv are summed, shared out by key. Tokens stand in depth-first order, so those that see a key follow it
// without a gap, and it stands at the same place, its depth, among what each of them sees.

#pragma once

#include <algorithm>
#include <memory>

#include "attention.h"

namespace {

// What attends: row t of q is (kv_heads, group, dim), of k and v (kv_heads, dim).
struct Heads {
    const float* q;
    int64_t q_row;
    const float* k;
    int64_t k_row;
    const float* v;
    int64_t v_row, kv_heads, group, dim;
    float scale;

    Pool<float> keys(int64_t h) const { return {k + h * dim, k_row}; }
    Pool<float> values(int64_t h) const { return {v + h * dim, v_row}; }
    const float* asked(int64_t t, int64_t h) const { return q + t * q_row + h * group * dim; }
    int64_t at(int64_t t, int64_t h) const { return (t * kv_heads + h) * group * dim; }  // in contiguous rows like q's
};

// Token t sees the tokens slots[first[t]], ... (seen[t] of them).
struct Seen {
    const int32_t* slots;
    const int64_t* first;
    const int32_t* seen;
    int64_t tokens, most;

    const int32_t* of(int64_t t) const { return slots + first[t]; }
};

constexpr int64_t STRETCH = 1 << 18;  // probabilities kept at a time, in numbers: as many as a core's cache holds

void attend_tree(const Heads& heads, const Seen& see, float* out, int threads) {
    const Attend<float> one = attend_of<float>(heads.group, heads.dim);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch(heads.group * (heads.dim + see.most));
        // tokens of one head follow each other: their keys are largely the same
#pragma omp for schedule(dynamic, 4)
        for (int64_t n = 0; n < see.tokens * heads.kv_heads; n++) {
            const int64_t h = n / see.tokens, t = n % see.tokens;
            one(heads.asked(t, h), heads.keys(h), heads.values(h), see.of(t), see.seen[t], heads.scale, out + heads.at(t, h),
                scratch.data(), heads.group, heads.dim);
        }
    }
}

// P and dS (G, seen) of the query heads of one key head at one token, and dq (G, dim).
template <int G>
void back_to_scores(const Heads& heads, int64_t h, int64_t t, const Seen& see, const float* grad, const float* out, float* p,
                    float* ds, float* grad_q) {
    const int64_t seen = see.seen[t], dim = heads.dim;
    const int32_t* slots = see.of(t);
    score_keys<float, G>(heads.asked(t, h), heads.keys(h), slots, seen, dim, heads.scale, p);
    score_keys<float, G>(grad, heads.values(h), slots, seen, dim, 1.0f, ds);
    for (int64_t g = 0; g < G; g++) {
        softmax_row<float>(p + g * seen, seen);
        float along = 0.0f;
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < dim; i++) along += grad[g * dim + i] * out[g * dim + i];
#pragma omp simd
        for (int64_t i = 0; i < seen; i++) ds[g * seen + i] = p[g * seen + i] * (ds[g * seen + i] - along) * heads.scale;
    }
    constexpr int PARTS = fitting(4, G);
    if (dim % (PARTS * WIDE) == 0)
        blend<float, G, PARTS>(ds, heads.keys(h), slots, seen, dim, grad_q);
    else
        blend<float, G, 1>(ds, heads.keys(h), slots, seen, dim, grad_q);
}

// Keys [key, key + count) that follow one another without a branch, so that tokens [key + count, until) see all of them.
struct Chain {
    int64_t key, count, until;
};

std::vector<Chain> chains(const Seen& see, int64_t most) {
    std::vector<int64_t> until(see.tokens), open;
    for (int64_t t = 0; t <= see.tokens; t++) {
        // a token ends whatever is as deep as it is, or deeper
        while (!open.empty() && (t == see.tokens || see.seen[open.back()] >= see.seen[t])) {
            until[open.back()] = t;
            open.pop_back();
        }
        open.push_back(t);
    }
    std::vector<Chain> found;
    for (int64_t t = 0; t < see.tokens; t++)
        if (found.empty() || found.back().until != until[t] || found.back().key + found.back().count != t ||
            found.back().count == most)
            found.push_back({t, 1, until[t]});
        else
            found.back().count++;
    return found;
}

// What a stretch of tokens keeps: (G, seen) numbers of head h of token t from place[t] + h G seen[t] on.
struct Kept {
    const float* data;
    const int64_t* place;
    const int32_t* seen;
};

// total[i] += sum over tokens [begin, end) and their G query heads of weight[depth + i] * row, for K keys; row (G, dim) of
// token t is at rows + t * row_step, and keys of `total` are total_step apart.
template <int G, int K, int PARTS>
inline void gather(const Kept& kept, int64_t h, int64_t depth, int64_t begin, int64_t end, const float* rows, int64_t row_step,
                   int64_t dim, float* total, int64_t total_step) {
    for (int64_t from = 0; from < dim; from += PARTS * WIDE) {
        floats sums[K][PARTS];
        for (int64_t n = 0; n < K; n++)
            for (int64_t i = 0; i < PARTS; i++) sums[n][i] = load_wide(total + n * total_step + from + i * WIDE);
        for (int64_t t = begin; t < end; t++) {
            const int64_t seen = kept.seen[t];
            const float *weight = kept.data + kept.place[t] + h * G * seen + depth, *row = rows + t * row_step + from;
            for (int64_t g = 0; g < G; g++, weight += seen, row += dim)
                for (int64_t i = 0; i < PARTS; i++) {
                    const floats part = load_wide(row + i * WIDE);
                    for (int64_t n = 0; n < K; n++) sums[n][i] += weight[n] * part;
                }
        }
        for (int64_t n = 0; n < K; n++)
            for (int64_t i = 0; i < PARTS; i++) store_wide(total + n * total_step + from + i * WIDE, sums[n][i]);
    }
}

constexpr int64_t CHAIN = SUMS / 4;

// The same for a chain of keys, of the tokens of a stretch [begin, end); PARTS registers at a time.
template <int G, int PARTS>
void gather_chain(const Chain& chain, const Kept& kept, int64_t h, int64_t depth, int64_t begin, int64_t end, const float* rows,
                  int64_t row_step, int64_t dim, float* total, int64_t total_step) {
    const int64_t all = chain.count == CHAIN ? chain.key + chain.count : chain.until;  // from there on all at once
    const int64_t last = std::min(end, chain.until);
    for (int64_t n = 0; n < chain.count; n++) {
        const int64_t first = std::max(begin, chain.key + n), stop = std::min(last, all);
        if (first < stop)
            gather<G, 1, PARTS>(kept, h, depth + n, first, stop, rows, row_step, dim, total + n * total_step, total_step);
    }
    if (std::max(begin, all) < last)
        gather<G, CHAIN, PARTS>(kept, h, depth, std::max(begin, all), last, rows, row_step, dim, total, total_step);
}

// What the way back keeps and knows of a pass before its threads begin.
struct TreeWork {
    std::vector<int64_t> place, begins;
    std::unique_ptr<float[]> p, ds;
    std::vector<Chain> keys;

    TreeWork(const Seen& see, int64_t heads) : place(see.tokens), keys(chains(see, CHAIN)) {
        int64_t room = 0, used = STRETCH;
        for (int64_t t = 0; t < see.tokens; t++) {
            const int64_t more = heads * see.seen[t];
            if (used + more > STRETCH) {
                begins.push_back(t);
                used = 0;
            }
            place[t] = used;
            used += more;
            room = std::max(room, used);
        }
        begins.push_back(see.tokens);
        p.reset(new float[room]);
        ds.reset(new float[room]);
    }
};

// Adds to grad_k and grad_v; for every thread of a team.
template <int G>
void attend_tree_backward(const Heads& heads, const Seen& see, const TreeWork& work, const float* grad, const float* out,
                          float* grad_q, float* grad_k, float* grad_v) {
    const int64_t kv = heads.kv_heads, dim = heads.dim, parts = work.keys.size();
    const Kept of_p{work.p.get(), work.place.data(), see.seen}, of_ds{work.ds.get(), work.place.data(), see.seen};
    const auto gather_keys = dim % (4 * WIDE) == 0 ? gather_chain<G, 4> : gather_chain<G, 1>;
    for (size_t stretch = 0; stretch + 1 < work.begins.size(); stretch++) {
        const int64_t begin = work.begins[stretch], end = work.begins[stretch + 1], tokens = end - begin;
#pragma omp for schedule(dynamic, 4)
        for (int64_t n = 0; n < tokens * kv; n++) {
            const int64_t h = n / tokens, t = begin + n % tokens, at = heads.at(t, h);
            const int64_t kept = work.place[t] + h * G * see.seen[t];
            back_to_scores<G>(heads, h, t, see, grad + at, out + at, work.p.get() + kept, work.ds.get() + kept, grad_q + at);
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t n = 0; n < parts * kv; n++) {
            const int64_t h = n / parts, to = heads.at(0, h) / G;
            const Chain& chain = work.keys[n % parts];
            if (chain.key >= end || chain.until <= begin) continue;
            const int64_t depth = see.seen[chain.key] - 1, row = kv * dim, key = chain.key * row + to;
            gather_keys(chain, of_ds, h, depth, begin, end, heads.asked(0, h), heads.q_row, dim, grad_k + key, row);
            gather_keys(chain, of_p, h, depth, begin, end, grad + heads.at(0, h), row * G, dim, grad_v + key, row);
        }
    }
}

void attend_tree_backward(const Heads& heads, const Seen& see, const TreeWork& work, const float* grad, const float* out,
                          float* grad_q, float* grad_k, float* grad_v, int threads) {
    auto run = heads.group == 1   ? attend_tree_backward<1>
               : heads.group == 2 ? attend_tree_backward<2>
               : heads.group == 3 ? attend_tree_backward<3>
               : heads.group == 4 ? attend_tree_backward<4>
               : heads.group == 7 ? attend_tree_backward<7>
                                  : attend_tree_backward<8>;
    team(threads, true, [&] { run(heads, see, work, grad, out, grad_q, grad_k, grad_v); });
}

}  // namespace

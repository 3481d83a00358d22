// Updates of low-rank adapters, whose inner dimension is too short for matrix libraries.

#pragma once

#include <algorithm>
#include <utility>

#include "wide.h"

namespace {

constexpr int64_t TOGETHER = 4;  // tokens for which rows of A and B are read once

// x A^T of N tokens, for R rows of A: that of token t and row r goes to out[r * N + t]
template <class T, int R, int N>
inline void against_rows(const T* x, int64_t x_row, const T* rows, int64_t size, float* out) {
    floats sums[R * N] = {};
    int64_t i = 0;
    for (; i + STEP<T> <= size; i += STEP<T>)
        for (int t = 0; t < N; t++)
            for (int r = 0; r < R; r++)
                sums[r * N + t] = multiply_add(sums[r * N + t], rows + r * size + i, x + t * x_row + i);
    sums_of(sums, out);
    for (int r = 0; r < R; r++)
        for (int t = 0; t < N; t++)
            for (int64_t at = i; at < size; at++) out[r * N + t] += load(rows[r * size + at]) * load(x[t * x_row + at]);
}

// out += inner B of N tokens, PARTS registers at a time from column `from` on, as far as they go; returns how far
template <class T, int N, int PARTS>
inline int64_t add_rows(const float* inner, const T* b, int64_t rank, int64_t fan_out, int64_t from, T* out, int64_t out_row) {
    int64_t o = from;
    for (; o + PARTS * WIDE <= fan_out; o += PARTS * WIDE) {
        floats sums[N][PARTS];
        for (int t = 0; t < N; t++)
            for (int i = 0; i < PARTS; i++) sums[t][i] = load_wide(out + t * out_row + o + i * WIDE);
        for (int64_t j = 0; j < rank; j++)
            for (int i = 0; i < PARTS; i++) {
                const floats part = load_wide(b + j * fan_out + o + i * WIDE);
                for (int t = 0; t < N; t++) sums[t][i] += inner[j * N + t] * part;
            }
        for (int t = 0; t < N; t++)
            for (int i = 0; i < PARTS; i++) store_wide(out + t * out_row + o + i * WIDE, sums[t][i]);
    }
    return o;
}

// out += scale (x A^T) B of N tokens; A (rank, fan_in), B (rank, fan_out). Where `kept` is not null, x A^T goes there.
template <class T, int N>
void low_rank(const T* x, int64_t x_row, T* out, int64_t out_row, const T* a, const T* b, int64_t rank, int64_t fan_in,
              int64_t fan_out, float scale, float* inner, T* kept) {
    int64_t j = 0;
    for (; j + 2 <= rank; j += 2) against_rows<T, 2, N>(x, x_row, a + j * fan_in, fan_in, inner + j * N);
    if (j < rank) against_rows<T, 1, N>(x, x_row, a + j * fan_in, fan_in, inner + j * N);
    for (j = 0; j < rank; j++)
        for (int t = 0; t < N; t++) {
            T narrow;
            store(narrow, inner[j * N + t]);
            if (kept) kept[t * rank + j] = narrow;
            inner[j * N + t] = load(narrow) * scale;
        }
    int64_t o = add_rows<T, N, 2>(inner, b, rank, fan_out, 0, out, out_row);
    o = add_rows<T, N, 1>(inner, b, rank, fan_out, o, out, out_row);
    for (; o < fan_out; o++)
        for (int t = 0; t < N; t++) {
            float sum = load(out[t * out_row + o]);
            for (j = 0; j < rank; j++) sum += inner[j * N + t] * load(b[j * fan_out + o]);
            store(out[t * out_row + o], sum);
        }
}

// Ranges of tokens [starts, ends) go through adapters of their own, in each of `layers` that read the same x: layer l
// writes rows of fan_out[l] to out[l], and the factors of range r there are a[l * ranges + r] and b[l * ranges + r]. If
// `kept` is not null, x A^T of range r in layer l, (tokens, rank), goes to kept[l * ranges + r].
template <class T>
void add_low_rank(const T* x, int64_t x_row, T* const* out, const int64_t* out_row, const int64_t* fan_out, int64_t layers,
                  const T* const* a, const T* const* b, const int64_t* ranks, const float* scales, const int64_t* starts,
                  const int64_t* ends, int64_t ranges, int64_t fan_in, int64_t most_rank, T* const* kept, int threads) {
    int64_t pieces = 0;
    for (int64_t r = 0; r < ranges; r++) pieces += (ends[r] - starts[r] + TOGETHER - 1) / TOGETHER;
    team(threads, pieces > 1, [=] {
        std::vector<float> scratch(TOGETHER * most_rank, 0.0f);
        float* inner = scratch.data();
#pragma omp for schedule(static)
        for (int64_t p = 0; p < pieces; p++) {
            int64_t r = 0, number = p;
            for (int64_t here; number >= (here = (ends[r] - starts[r] + TOGETHER - 1) / TOGETHER); r++) number -= here;
            const int64_t t = starts[r] + number * TOGETHER, rank = ranks[r];
            auto run = ends[r] - t == 1   ? low_rank<T, 1>
                       : ends[r] - t == 2 ? low_rank<T, 2>
                       : ends[r] - t == 3 ? low_rank<T, 3>
                                          : low_rank<T, 4>;
            for (int64_t l = 0; l < layers; l++) {
                const int64_t row = out_row[l], wide = fan_out[l];
                const T *in = x + t * x_row, *left = a[l * ranges + r], *right = b[l * ranges + r];
                T *to = out[l] + t * row, *keep = kept ? kept[l * ranges + r] + (t - starts[r]) * rank : nullptr;
                run(in, x_row, to, row, left, right, rank, fan_in, wide, scales[r], inner, keep);
            }
        }
    });
}

// -- gradients of the factors -------------------------------------------------------------------------------------------

// sum over `tokens` of scale left[t][j] x[t][i], to be added to to[j][i], or to[i][j] if it stands transposed.
template <class T> struct Outer {
    const T* left;  // (tokens, rank)
    const T* x;     // rows x_row apart, of `size`
    float* to;
    int64_t rank, x_row, tokens, size, transposed;
    float scale;
};

constexpr int64_t OUTER_WIDTH = 4 * WIDE, OUTER_RANKS = SUMS / 3, OUTER_TOKENS = 128;

// R rows and two registers of the sum, over tokens whose slices of x follow each other
template <int R>
inline void outer_tile(const float* left, int64_t left_row, const float* x, int64_t tokens, float* to) {
    floats sums[R][2];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 2; i++) sums[r][i] = load_wide(to + r * OUTER_WIDTH + i * WIDE);
    for (int64_t t = 0; t < tokens; t++) {
        const floats a = load_wide(x + t * OUTER_WIDTH), b = load_wide(x + t * OUTER_WIDTH + WIDE);
        for (int r = 0; r < R; r++) {
            sums[r][0] += left[t * left_row + r] * a;
            sums[r][1] += left[t * left_row + r] * b;
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 2; i++) store_wide(to + r * OUTER_WIDTH + i * WIDE, sums[r][i]);
}

inline const float* widened(const float* x, int64_t, float*) { return x; }
inline const float* widened(const bf16* x, int64_t count, float* scratch) {
    for (int64_t i = 0; i < count; i++) scratch[i] = load(x[i]);
    return scratch;
}

// Columns [at, at + OUTER_WIDTH) of one sum; scratch: OUTER_TOKENS slices of x and rows of `left`, then (rank, OUTER_WIDTH).
template <class T> void outer_slice(const Outer<T>& job, int64_t at, float* scratch) {
    const int64_t wide = std::min(OUTER_WIDTH, job.size - at), rank = job.rank;
    float *slice = scratch, *room = slice + OUTER_TOKENS * OUTER_WIDTH, *sum = room + OUTER_TOKENS * rank;
    std::fill(slice, slice + OUTER_TOKENS * OUTER_WIDTH, 0.0f);
    std::fill(sum, sum + rank * OUTER_WIDTH, 0.0f);
    for (int64_t begin = 0; begin < job.tokens; begin += OUTER_TOKENS) {
        // rows of x are far apart, at distances that caches are bad at
        const int64_t tokens = std::min(OUTER_TOKENS, job.tokens - begin);
        for (int64_t t = 0; t < tokens; t++) {
            const T* row = job.x + (begin + t) * job.x_row + at;
            if (wide == OUTER_WIDTH)
                for (int64_t i = 0; i < OUTER_WIDTH; i += WIDE) store_wide(slice + t * OUTER_WIDTH + i, load_wide(row + i));
            else
                for (int64_t i = 0; i < wide; i++) slice[t * OUTER_WIDTH + i] = load(row[i]);
        }
        const float* left = widened(job.left + begin * rank, tokens * rank, room);
        for (int64_t i = 0; i < OUTER_WIDTH; i += 2 * WIDE) {
            int64_t j = 0;
            for (; j + OUTER_RANKS <= rank; j += OUTER_RANKS)
                outer_tile<OUTER_RANKS>(left + j, rank, slice + i, tokens, sum + j * OUTER_WIDTH + i);
            for (; j < rank; j++) outer_tile<1>(left + j, rank, slice + i, tokens, sum + j * OUTER_WIDTH + i);
        }
    }
    if (job.transposed) {
        for (int64_t i = 0; i < wide; i++)
            for (int64_t j = 0; j < rank; j++) job.to[(at + i) * rank + j] += job.scale * sum[j * OUTER_WIDTH + i];
    } else {
        for (int64_t j = 0; j < rank; j++)
            for (int64_t i = 0; i < wide; i++) job.to[j * job.size + at + i] += job.scale * sum[j * OUTER_WIDTH + i];
    }
}

template <class T> void outer(const Outer<T>* jobs, int64_t count, int threads) {
    team(threads, true, [=] {
        std::vector<std::pair<int64_t, int64_t>> pieces;
        int64_t most_rank = 0;
        for (int64_t n = 0; n < count; n++) {
            most_rank = std::max(most_rank, jobs[n].rank);
            for (int64_t at = 0; at < jobs[n].size; at += OUTER_WIDTH) pieces.push_back({n, at});
        }
        std::vector<float> scratch(OUTER_TOKENS * (OUTER_WIDTH + most_rank) + most_rank * OUTER_WIDTH);
#pragma omp for schedule(dynamic, 8)
        for (size_t p = 0; p < pieces.size(); p++) outer_slice(jobs[pieces[p].first], pieces[p].second, scratch.data());
    });
}

}  // namespace

// Updates of low-rank adapters, whose inner dimension is too short for matrix libraries.

#pragma once

#include "wide.h"

namespace {

constexpr int64_t TOGETHER = 4;  // tokens for which a row of B is read once

// x A^T of N tokens, for one row of A
template <int N> inline void against_row(const float* x, int64_t x_row, const float* row, int64_t size, float* out) {
    floats sums[N] = {};
    int64_t i = 0;
    for (; i + WIDE <= size; i += WIDE)
        for (int t = 0; t < N; t++) sums[t] += load_wide(row + i) * load_wide(x + t * x_row + i);
    for (int t = 0; t < N; t++) {
        float sum = sum_of(sums[t]);
        for (int64_t at = i; at < size; at++) sum += row[at] * x[t * x_row + at];
        out[t] = sum;
    }
}
template <int N> inline void against_row(const bf16* x, int64_t x_row, const bf16* row, int64_t size, float* out) {
    int64_t i = 0;
    for (int t = 0; t < N; t++) out[t] = 0.0f;
#ifdef __AVX512BF16__
    __m512 sums[N] = {};
    for (; i + 32 <= size; i += 32) {
        __m512bh wide = (__m512bh)_mm512_loadu_si512(row + i);
        for (int t = 0; t < N; t++)
            sums[t] = _mm512_dpbf16_ps(sums[t], wide, (__m512bh)_mm512_loadu_si512(x + t * x_row + i));
    }
    for (int t = 0; t < N; t++) out[t] = _mm512_reduce_add_ps(sums[t]);
#else
    floats sums[N] = {};
    for (; i + WIDE <= size; i += WIDE)
        for (int t = 0; t < N; t++) sums[t] += load_wide(row + i) * load_wide(x + t * x_row + i);
    for (int t = 0; t < N; t++) out[t] = sum_of(sums[t]);
#endif
    for (; i < size; i++)
        for (int t = 0; t < N; t++) out[t] += load(row[i]) * load(x[t * x_row + i]);
}

// out += scale (x A^T) B of N tokens; A (rank, fan_in), B (rank, fan_out). Where `kept` is not null, x A^T goes there.
template <class T, int N>
void low_rank(const T* x, int64_t x_row, T* out, int64_t out_row, const T* a, const T* b, int64_t rank, int64_t fan_in,
              int64_t fan_out, float scale, float* inner, T* kept) {
    for (int64_t j = 0; j < rank; j++) {
        against_row<N>(x, x_row, a + j * fan_in, fan_in, inner + j * N);
        for (int t = 0; t < N; t++) {
            T narrow;
            store(narrow, inner[j * N + t]);
            if (kept) kept[t * rank + j] = narrow;
            inner[j * N + t] = load(narrow) * scale;
        }
    }
    int64_t o = 0;
    for (; o + WIDE <= fan_out; o += WIDE) {
        floats sums[N];
        for (int t = 0; t < N; t++) sums[t] = load_wide(out + t * out_row + o);
        for (int64_t j = 0; j < rank; j++) {
            floats row = load_wide(b + j * fan_out + o);
            for (int t = 0; t < N; t++) sums[t] += inner[j * N + t] * row;
        }
        for (int t = 0; t < N; t++) store_wide(out + t * out_row + o, sums[t]);
    }
    for (; o < fan_out; o++)
        for (int t = 0; t < N; t++) {
            float sum = load(out[t * out_row + o]);
            for (int64_t j = 0; j < rank; j++) sum += inner[j * N + t] * load(b[j * fan_out + o]);
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
    std::vector<int64_t> range, first;
    for (int64_t r = 0; r < ranges; r++)
        for (int64_t t = starts[r]; t < ends[r]; t += TOGETHER) {
            range.push_back(r);
            first.push_back(t);
        }
    const int64_t pieces = range.size();
#pragma omp parallel num_threads(threads) if (pieces > 1)
    {
        std::vector<float> scratch(TOGETHER * most_rank, 0.0f);
        float* inner = scratch.data();
#pragma omp for schedule(static)
        for (int64_t p = 0; p < pieces; p++)
            for (int64_t l = 0; l < layers; l++) {
                const int64_t r = range[p], t = first[p], rank = ranks[r], row = out_row[l], wide = fan_out[l];
                const T *in = x + t * x_row, *left = a[l * ranges + r], *right = b[l * ranges + r];
                T *to = out[l] + t * row, *keep = kept ? kept[l * ranges + r] + (t - starts[r]) * rank : nullptr;
                auto run = ends[r] - t == 1   ? low_rank<T, 1>
                           : ends[r] - t == 2 ? low_rank<T, 2>
                           : ends[r] - t == 3 ? low_rank<T, 3>
                                              : low_rank<T, 4>;
                run(in, x_row, to, row, left, right, rank, fan_in, wide, scales[r], inner, keep);
            }
    }
}

}  // namespace

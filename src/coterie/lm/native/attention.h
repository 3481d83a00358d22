// Attention: of tokens to cached keys, and the softmax of attention within a pass with its way back.

#pragma once

#include "layers.h"
#include "wide.h"

namespace {

// -- attention of cached keys -----------------------------------------------------------------------------------------

// Keys or values of one head: that of a slot begins at data + slot * row.
template <class T> struct Pool {
    const T* data;
    int64_t row;
};

constexpr int64_t AHEAD = 8;  // keys by which reading runs ahead

// scores of K keys for the G query heads; those of head g go to scores + g * row
template <class T, int G, int K>
inline void score_some(const T* q, Pool<T> keys, const int32_t* slots, int64_t dim, float scale, float* scores, int64_t row) {
    floats sums[G * K] = {};
    const T* key[K];
    for (int64_t n = 0; n < K; n++) key[n] = keys.data + slots[n] * keys.row;
    for (int64_t i = 0; i < dim; i += STEP<T>)
        for (int64_t n = 0; n < K; n++)
            for (int64_t g = 0; g < G; g++)
                sums[g * K + n] = multiply_add(sums[g * K + n], q + g * dim + i, key[n] + i);
    float found[G * K];
    sums_of(sums, found);
    for (int64_t g = 0; g < G; g++)
        for (int64_t n = 0; n < K; n++) scores[g * row + n] = found[g * K + n] * scale;
}

// Ask for the row of a slot, that is soon to be read. Rows of one sequence lie wherever there was a slot, so that without
// this each is waited for.
template <class T> inline void bring(Pool<T> rows, int32_t slot, int64_t dim) {
    for (int64_t i = 0; i < dim; i += LINE<T>) __builtin_prefetch(rows.data + slot * rows.row + i);
}

// the power of two, at most `wanted`, that times `sums` registers hold
constexpr int64_t fitting(int64_t wanted, int64_t sums) {
    int64_t found = wanted;
    while (found > 1 && found * sums > SUMS) found /= 2;
    return found;
}

// scale q k of the G query heads (G, dim) and all keys they see, to scores (G, seen); rows of `next`, if that is not null,
// are read after that
template <class T, int G>
inline void score_keys(const T* q, Pool<T> keys, const int32_t* slots, int64_t seen, int64_t dim, float scale, float* scores,
                       const Pool<T>* next = nullptr) {
    constexpr int64_t KEYS = fitting(4, G);
    int64_t first = 0;
    for (; first + KEYS <= seen; first += KEYS) {
        if (next)
            for (int64_t n = first; n < first + KEYS; n++) {
                if (n + AHEAD < seen) bring(keys, slots[n + AHEAD], dim);
                bring(*next, slots[n], dim);
            }
        score_some<T, G, KEYS>(q, keys, slots + first, dim, scale, scores + first, seen);
    }
    for (; first < seen; first++) score_some<T, G, 1>(q, keys, slots + first, dim, scale, scores + first, seen);
}

// sum of weight * value over the keys that are seen, PARTS registers of `dim` at a time: weights (G, seen) to out (G, dim)
template <class T, int G, int PARTS>
inline void blend(const float* weights, Pool<T> values, const int32_t* slots, int64_t seen, int64_t dim, T* out) {
    for (int64_t at = 0; at < dim; at += PARTS * WIDE) {
        floats sums[G][PARTS] = {};
        for (int64_t n = 0; n < seen; n++) {
            const T* value = values.data + slots[n] * values.row + at;
            for (int64_t g = 0; g < G; g++)
                for (int64_t i = 0; i < PARTS; i++) sums[g][i] += weights[g * seen + n] * load_wide(value + i * WIDE);
        }
        for (int64_t g = 0; g < G; g++)
            for (int64_t i = 0; i < PARTS; i++) store_wide(out + g * dim + at + i * WIDE, sums[g][i]);
    }
}

// probabilities of n keys from their scores, in place
template <class T> void softmax_row(float* row, int64_t n) {
    float most = row[0], sum = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; i++) most = row[i] > most ? row[i] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        row[i] = quick_exp(row[i] - most);
        sum += row[i];
    }
    float share = 1.0f / sum;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) row[i] = rounded<T>(row[i] * share);
}

// The G query heads of one key head at one token; scratch: (G, seen).
template <class T, int G, int D>
void attend_token(const T* q, Pool<T> keys, Pool<T> values, const int32_t* slots, int64_t seen, float scale, T* out,
                  float* scratch, int64_t, int64_t) {
    score_keys<T, G>(q, keys, slots, seen, D, scale, scratch, &values);
    for (int64_t g = 0; g < G; g++) softmax_row<T>(scratch + g * seen, seen);
    blend<T, G, fitting(D / WIDE, G)>(scratch, values, slots, seen, D, out);
}

// The same for any group and dimension; scratch: (group, seen), then (group, dim).
template <class T>
void attend_any(const T* q, Pool<T> keys, Pool<T> values, const int32_t* slots, int64_t seen, float scale, T* out,
                float* scratch, int64_t group, int64_t dim) {
    for (int64_t n = 0; n < seen; n++) {
        const T* key = keys.data + slots[n] * keys.row;
        for (int64_t g = 0; g < group; g++) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < dim; i++) sum += load(q[g * dim + i]) * load(key[i]);
            scratch[g * seen + n] = sum * scale;
        }
    }
    for (int64_t g = 0; g < group; g++) softmax_row<T>(scratch + g * seen, seen);
    float* total = scratch + group * seen;
    std::memset(total, 0, group * dim * sizeof(float));
    for (int64_t n = 0; n < seen; n++) {
        const T* value = values.data + slots[n] * values.row;
        for (int64_t g = 0; g < group; g++) {
            float p = scratch[g * seen + n];
#pragma omp simd
            for (int64_t i = 0; i < dim; i++) total[g * dim + i] += p * load(value[i]);
        }
    }
    for (int64_t i = 0; i < group * dim; i++) store(out[i], total[i]);
}

template <class T> using Attend = void (*)(const T*, Pool<T>, Pool<T>, const int32_t*, int64_t, float, T*, float*,
                                           int64_t, int64_t);

template <class T, int D> Attend<T> attend_of(int64_t group) {
    switch (group) {
        case 1: return attend_token<T, 1, D>;
        case 2: return attend_token<T, 2, D>;
        case 3: return attend_token<T, 3, D>;
        case 4: return attend_token<T, 4, D>;
        case 7: return attend_token<T, 7, D>;
        case 8: return attend_token<T, 8, D>;
        default: return attend_any<T>;
    }
}
template <class T> Attend<T> attend_of(int64_t group, int64_t dim) {
    return dim == 64 ? attend_of<T, 64>(group) : dim == 128 ? attend_of<T, 128>(group) : attend_any<T>;
}

// Keys and values of the tokens go, keys rotated, to their slots; then every token asks the keys it sees.
template <class T>
void attend(const T* q, int64_t q_row, const T* k, int64_t k_row, const T* v, int64_t v_row, const T* cos, const T* sin,
            int64_t angle_row, T* pool_k, T* pool_v, int64_t pool_head, const int64_t* own, const int32_t* slots,
            const int64_t* first, const int32_t* seen, T* out, int64_t tokens, int64_t kv_heads, int64_t group, int64_t dim,
            float scale, int64_t most_seen, int threads) {
    Attend<T> one = attend_of<T>(group, dim);
    team(threads, true, [=] {
        std::vector<float> scratch(group * (dim + most_seen));
        std::vector<T> turned(group * dim);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t h = 0; h < kv_heads; h++) {
                T* place = pool_k + h * pool_head + own[t] * dim;
                rotate_head(k + t * k_row + h * dim, place, cos + t * angle_row, sin + t * angle_row, 1.0f, dim / 2);
                std::memcpy(pool_v + h * pool_head + own[t] * dim, v + t * v_row + h * dim, dim * sizeof(T));
            }
#pragma omp for schedule(dynamic, 4)
        for (int64_t n = 0; n < tokens * kv_heads; n++) {
            // tokens of one head follow each other: their keys are largely the same
            int64_t h = n / tokens, t = n % tokens;
            for (int64_t g = 0; g < group; g++)
                rotate_head(q + t * q_row + (h * group + g) * dim, turned.data() + g * dim, cos + t * angle_row,
                            sin + t * angle_row, 1.0f, dim / 2);
            one(turned.data(), {pool_k + h * pool_head, dim}, {pool_v + h * pool_head, dim}, slots + first[t], seen[t], scale,
                out + (t * kv_heads + h) * group * dim, scratch.data(), group, dim);
        }
    });
}

// -- attention within a pass --------------------------------------------------------------------------------------------

// softmax(scale scores) in place over what is visible; scores (heads, n, keys), visible (n, keys) shared by all heads
template <class T>
void masked_softmax(T* scores, const uint8_t* visible, float scale, int64_t heads, int64_t n, int64_t keys, int threads) {
#pragma omp parallel num_threads(threads) if (heads * n * keys > PARALLEL)
    {
        std::vector<float> scratch(keys);
        float* z = scratch.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < heads * n; row++) {
            T* s = scores + row * keys;
            const uint8_t* see = visible + (row % n) * keys;
            float most = -std::numeric_limits<float>::infinity(), sum = 0.0f;
#pragma omp simd reduction(max : most)
            for (int64_t i = 0; i < keys; i++) {
                z[i] = see[i] ? load(s[i]) * scale : -std::numeric_limits<float>::infinity();
                most = z[i] > most ? z[i] : most;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < keys; i++) {
                z[i] = quick_exp(z[i] - most);
                sum += z[i];
            }
            float share = 1.0f / sum;
#pragma omp simd
            for (int64_t i = 0; i < keys; i++) store(s[i], z[i] * share);
        }
    }
}

// dS = P (dP - rowsum(dO O)) scale, written over dP (rows, keys); dO and O (rows, dim)
template <class T>
void softmax_scores_backward(T* spread, const T* weights, const T* grad, const T* out, float scale, int64_t rows,
                             int64_t keys, int64_t dim, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * keys > PARALLEL) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        T* d = spread + row * keys;
        const T *p = weights + row * keys, *g = grad + row * dim, *o = out + row * dim;
        float along = 0.0f;
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < dim; i++) along += load(g[i]) * load(o[i]);
#pragma omp simd
        for (int64_t i = 0; i < keys; i++) store(d[i], (load(d[i]) - along) * load(p[i]) * scale);
    }
}

}  // namespace

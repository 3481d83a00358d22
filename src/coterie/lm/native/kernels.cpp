// What stands between a decoder's matrix products, on a processor: each function is one pass over memory.
//
// Storage type T is float or bfloat16 (suffixes _f32 and _bf16); arithmetic is float32. Rows are shared out among
// `threads`, and every number is computed by one thread in one order, so results do not depend on their number.
// Callers (coterie.lm.native) have checked types, shapes and strides; nothing here allocates beyond scratch space.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

struct bf16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) {
    uint32_t wide = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}
inline void store(float& to, float x) { to = x; }
inline void store(bf16& to, float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    // to the nearest, ties to even; what is not a number stays that
    uint32_t rounded = (wide + 0x7FFFu + ((wide >> 16) & 1u)) >> 16;
    to.bits = uint16_t((wide & 0x7FFFFFFFu) > 0x7F800000u ? (wide >> 16) | 0x40u : rounded);
}
template <class T> inline float rounded(float x) {
    T kept;
    store(kept, x);
    return load(kept);
}

// exp by 2^n * p(r), r in [-ln2/2, ln2/2]; relative error below 2e-7, zero below -87.3
inline float quick_exp(float x) {
    float clamped = x < -87.3f ? -87.3f : (x > 88.7f ? 88.7f : x);
    float n = std::nearbyint(clamped * 1.44269504f);
    float r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return x < -87.3f ? 0.0f : p * scale;
}

constexpr int64_t PARALLEL = 16384;  // elements below which waking threads costs more than they save

// -- norms ------------------------------------------------------------------------------------------------------------

template <class T>
void rms_norm(const T* x, int64_t x_row, const T* added, T* total, const float* weight, float eps, T* y, float* inverse,
              int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > PARALLEL) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T* in = x + r * x_row;
        float sum = 0.0f;
        if (added) {
            const T* more = added + r * size;
            T* out = total + r * size;
#pragma omp simd
            for (int64_t i = 0; i < size; i++) store(out[i], load(in[i]) + load(more[i]));
            in = out;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++) sum += load(in[i]) * load(in[i]);
        float inv = 1.0f / std::sqrt(sum / size + eps);
        if (inverse) inverse[r] = inv;
        T* out = y + r * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) store(out[i], load(in[i]) * inv * weight[i]);
    }
}

// y = x r w, r = (mean x^2 + eps)^(-1/2):  dx = r w g - x r^3 mean(x w g)
template <class T>
void rms_norm_backward(const T* grad, const T* x, int64_t x_row, const float* weight, const float* inverse, T* out,
                       int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > PARALLEL) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T *g = grad + r * size, *in = x + r * x_row;
        float along = 0.0f, inv = inverse[r];
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < size; i++) along += load(g[i]) * weight[i] * load(in[i]);
        float back = along * inv * inv * inv / size;
        T* to = out + r * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) store(to[i], load(g[i]) * weight[i] * inv - load(in[i]) * back);
    }
}

// -- rotary positions -------------------------------------------------------------------------------------------------

template <class T>
inline void rotate_head(const T* in, T* out, const T* cos, const T* sin, float sign, int64_t half) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float a = load(in[i]), b = load(in[half + i]), c = load(cos[i]), s = sign * load(sin[i]);
        store(out[i], a * c - b * s);
        store(out[half + i], b * c + a * s);
    }
}

template <class T>
void rotate(const T* x, int64_t x_row, T* y, const T* cos, const T* sin, int64_t angle_row, float sign, int64_t rows,
            int64_t heads, int64_t dim, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * heads * dim > PARALLEL) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++)
            rotate_head(x + r * x_row + h * dim, y + (r * heads + h) * dim, cos + r * angle_row, sin + r * angle_row, sign,
                        dim / 2);
}

// -- gates ------------------------------------------------------------------------------------------------------------

template <class T>
void swiglu(const T* gate, int64_t gate_row, const T* up, int64_t up_row, T* y, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > PARALLEL) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T *g = gate + r * gate_row, *u = up + r * up_row;
        T* out = y + r * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            float v = load(g[i]);
            store(out[i], v / (1.0f + quick_exp(-v)) * load(u[i]));
        }
    }
}

// silu'(v) = s (1 + v (1 - s)), s = 1 / (1 + exp(-v))
template <class T>
void swiglu_backward(const T* grad, const T* gate, int64_t gate_row, const T* up, int64_t up_row, T* grad_gate, T* grad_up,
                     int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > PARALLEL) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T *d = grad + r * size, *g = gate + r * gate_row, *u = up + r * up_row;
        T *to_gate = grad_gate + r * size, *to_up = grad_up + r * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            float v = load(g[i]), s = 1.0f / (1.0f + quick_exp(-v)), back = load(d[i]);
            store(to_up[i], back * v * s);
            store(to_gate[i], back * load(u[i]) * s * (1.0f + v * (1.0f - s)));
        }
    }
}

// -- attention of cached keys -----------------------------------------------------------------------------------------

// The product of two vectors. Of bfloat16, some processors add up pairs of products without widening them first.
template <int D> inline float dot(const float* a, const float* b, int64_t some_dim) {
    const int64_t dim = D ? D : some_dim;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; i++) sum += a[i] * b[i];
    return sum;
}
template <int D> inline float dot(const bf16* a, const bf16* b, int64_t some_dim) {
    const int64_t dim = D ? D : some_dim;
#ifdef __AVX512BF16__
    if (D && D % 32 == 0) {
        __m512 sums = _mm512_setzero_ps();
        for (int64_t i = 0; i < D; i += 32)
            sums = _mm512_dpbf16_ps(sums, (__m512bh)_mm512_loadu_si512(a + i), (__m512bh)_mm512_loadu_si512(b + i));
        return _mm512_reduce_add_ps(sums);
    }
#endif
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; i++) sum += load(a[i]) * load(b[i]);
    return sum;
}

// The G query heads of one key head at one token. G and D are known to the compiler where they are not 0.
template <class T, int G, int D>
void attend_token(const T* q, const T* keys, const T* values, const int32_t* slots, int64_t seen, float scale, T* out,
                  float* scratch, int64_t some_group, int64_t some_dim) {
    const int64_t group = G ? G : some_group, dim = D ? D : some_dim;
    float* scores = scratch;              // (group, seen)
    for (int64_t n = 0; n < seen; n++) {
        const T* key = keys + slots[n] * dim;
        for (int64_t g = 0; g < group; g++) scores[g * seen + n] = dot<D>(q + g * dim, key, dim) * scale;
    }
    for (int64_t g = 0; g < group; g++) {
        float* row = scores + g * seen;
        float most = row[0], sum = 0.0f;
#pragma omp simd reduction(max : most)
        for (int64_t n = 0; n < seen; n++) most = row[n] > most ? row[n] : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t n = 0; n < seen; n++) {
            row[n] = quick_exp(row[n] - most);
            sum += row[n];
        }
        float share = 1.0f / sum;
#pragma omp simd
        for (int64_t n = 0; n < seen; n++) row[n] = rounded<T>(row[n] * share);
    }
    if (G && D) {
        float total[G ? G : 1][D ? D : 1] = {};
        for (int64_t n = 0; n < seen; n++) {
            const T* value = values + slots[n] * D;
            for (int64_t g = 0; g < G; g++) {
                float p = scores[g * seen + n];
#pragma omp simd
                for (int64_t i = 0; i < D; i++) total[g][i] += p * load(value[i]);
            }
        }
        for (int64_t g = 0; g < G; g++)
            for (int64_t i = 0; i < D; i++) store(out[g * D + i], total[g][i]);
        return;
    }
    float* total = scores + group * seen;  // (group, dim)
    std::memset(total, 0, group * dim * sizeof(float));
    for (int64_t n = 0; n < seen; n++) {
        const T* value = values + slots[n] * dim;
        for (int64_t g = 0; g < group; g++) {
            float p = scores[g * seen + n];
#pragma omp simd
            for (int64_t i = 0; i < dim; i++) total[g * dim + i] += p * load(value[i]);
        }
    }
    for (int64_t i = 0; i < group * dim; i++) store(out[i], total[i]);
}

template <class T> using Attend = void (*)(const T*, const T*, const T*, const int32_t*, int64_t, float, T*, float*,
                                           int64_t, int64_t);

template <class T, int D> Attend<T> by_group(int64_t group) {
    switch (group) {
        case 1: return attend_token<T, 1, D>;
        case 2: return attend_token<T, 2, D>;
        case 3: return attend_token<T, 3, D>;
        case 4: return attend_token<T, 4, D>;
        case 7: return attend_token<T, 7, D>;
        case 8: return attend_token<T, 8, D>;
        default: return attend_token<T, 0, D>;
    }
}

// Keys and values of the tokens go, keys rotated, to their slots; then every token asks the keys it sees.
template <class T>
void attend(const T* q, int64_t q_row, const T* k, int64_t k_row, const T* v, int64_t v_row, const T* cos, const T* sin,
            int64_t angle_row, T* pool_k, T* pool_v, int64_t pool_head, const int32_t* own, const int32_t* slots,
            const int64_t* first, const int32_t* seen, T* out, int64_t tokens, int64_t kv_heads, int64_t group, int64_t dim,
            float scale, int64_t most_seen, int threads) {
    Attend<T> one = dim == 64 ? by_group<T, 64>(group) : dim == 128 ? by_group<T, 128>(group) : by_group<T, 0>(group);
#pragma omp parallel num_threads(threads)
    {
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
            one(turned.data(), pool_k + h * pool_head, pool_v + h * pool_head, slots + first[t], seen[t], scale,
                out + (t * kv_heads + h) * group * dim, scratch.data(), group, dim);
        }
    }
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

// -- low-rank updates of few tokens -------------------------------------------------------------------------------------

typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
constexpr int64_t WIDE = 16;

inline floats load_wide(const float* from) {
    floats out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
inline floats load_wide(const bf16* from) {
    halves bits;
    std::memcpy(&bits, from, sizeof bits);
    return (floats)(__builtin_convertvector(bits, words) << 16);
}
inline void store_wide(float* to, floats x) { std::memcpy(to, &x, sizeof x); }
inline void store_wide(bf16* to, floats x) {
    words wide = (words)x;
    halves bits = __builtin_convertvector((wide + 0x7FFFu + ((wide >> 16) & 1u)) >> 16, halves);
    std::memcpy(to, &bits, sizeof bits);
}

constexpr int64_t TOGETHER = 4;  // tokens for which a row of B is read once

// x A^T of N tokens, for one row of A
template <int N> inline void against_row(const float* x, int64_t x_row, const float* row, int64_t size, float* out) {
    floats sums[N] = {};
    int64_t i = 0;
    for (; i + WIDE <= size; i += WIDE)
        for (int t = 0; t < N; t++) sums[t] += load_wide(row + i) * load_wide(x + t * x_row + i);
    for (int t = 0; t < N; t++) {
        float sum = 0.0f;
        for (int lane = 0; lane < WIDE; lane++) sum += sums[t][lane];
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
    for (int t = 0; t < N; t++)
        for (int lane = 0; lane < WIDE; lane++) out[t] += sums[t][lane];
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

// -- sampling ---------------------------------------------------------------------------------------------------------

constexpr int64_t CHUNK = 256;  // logits whose probabilities are summed before one of them is looked for

// Row by row, with z the logits times the row's sharpness (one over the temperature): the largest logit and where it is,
// log of the sum of exp(z - max z), entropy, and the sums of its chunks.
template <class T>
void summarise(const T* logits, int64_t rows, int64_t size, const float* sharpness, double* log_z, double* entropy,
               double* chunks, int64_t* best, float* most, int threads) {
    const int64_t count = (size + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T* row = logits + r * size;
        float high = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : high)
        for (int64_t i = 0; i < size; i++) {
            float z = load(row[i]);
            high = z > high ? z : high;
        }
        int64_t at = 0;
        while (load(row[at]) != high && at < size - 1) at++;
        double sum = 0.0, moment = 0.0;
        for (int64_t c = 0; c < count; c++) {
            int64_t end = (c + 1) * CHUNK < size ? (c + 1) * CHUNK : size;
            float part = 0.0f, weighed = 0.0f;
#pragma omp simd reduction(+ : part, weighed)
            for (int64_t i = c * CHUNK; i < end; i++) {
                float z = (load(row[i]) - high) * sharpness[r];
                float e = quick_exp(z);
                part += e;
                weighed += e > 0.0f ? e * z : 0.0f;
            }
            chunks[r * count + c] = part;
            sum += part;
            moment += weighed;
        }
        best[r] = at;
        most[r] = high;
        log_z[r] = std::log(sum);
        entropy[r] = log_z[r] - moment / sum;
    }
}

// The tokens whose cumulative probability reaches each uniform number; logprob of what is found (or of the best).
template <class T>
void pick(const T* logits, int64_t size, const float* sharpness, const double* log_z, const double* chunks,
          const int64_t* best, const float* most, const int64_t* row_of, const double* uniforms, int64_t* found,
          double* logprob, int64_t asked) {
    const int64_t count = (size + CHUNK - 1) / CHUNK;
    for (int64_t n = 0; n < asked; n++) {
        int64_t r = row_of[n], token = best[r];
        const T* row = logits + r * size;
        if (uniforms[n] >= 0.0) {
            const double* sums = chunks + r * count;
            double total = 0.0, before = 0.0;
            for (int64_t c = 0; c < count; c++) total += sums[c];
            double target = uniforms[n] * total;
            int64_t c = 0;
            while (c < count - 1 && before + sums[c] <= target) before += sums[c++];
            int64_t end = (c + 1) * CHUNK < size ? (c + 1) * CHUNK : size;
            int64_t last = -1;
            for (int64_t i = c * CHUNK; i < end; i++) {
                float e = quick_exp((load(row[i]) - most[r]) * sharpness[r]);
                if (e <= 0.0f) continue;
                last = i;
                before += e;
                if (before > target) break;
            }
            // rounding may carry the target past the chunk: the last token that has any probability is meant
            if (last >= 0) token = last;
        }
        found[n] = token;
        logprob[n] = (double(load(row[token])) - most[r]) * sharpness[r] - log_z[r];
    }
}

// The gradient at logits whose rows' log-probabilities lp and entropy were asked for: sharpness p (alpha + beta lp); what
// single tokens add is the caller's. May be written over the logits.
template <class T>
void softmax_backward(const T* logits, int64_t rows, int64_t size, const float* sharpness, const float* most,
                      const double* log_z, const float* alpha, const float* beta, T* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T* row = logits + r * size;
        T* to = out + r * size;
        float high = most[r], sharp = sharpness[r], log_sum = float(log_z[r]), a = alpha[r], b = beta[r];
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            float lp = (load(row[i]) - high) * sharp - log_sum;
            store(to[i], sharp * quick_exp(lp) * (a + b * (lp < -1e4f ? -1e4f : lp)));
        }
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#define KERNELS(T, S)                                                                                                       \
    EXPORT void rms_norm_##S(const T* x, int64_t x_row, const T* added, T* total, const float* weight, float eps, T* y,     \
                             float* inverse, int64_t rows, int64_t size, int threads) {                                     \
        rms_norm(x, x_row, added, total, weight, eps, y, inverse, rows, size, threads);                                     \
    }                                                                                                                       \
    EXPORT void rms_norm_backward_##S(const T* grad, const T* x, int64_t x_row, const float* weight, const float* inverse,  \
                                      T* out, int64_t rows, int64_t size, int threads) {                                    \
        rms_norm_backward(grad, x, x_row, weight, inverse, out, rows, size, threads);                                       \
    }                                                                                                                       \
    EXPORT void rotate_##S(const T* x, int64_t x_row, T* y, const T* cos, const T* sin, int64_t angle_row, float sign,      \
                           int64_t rows, int64_t heads, int64_t dim, int threads) {                                         \
        rotate(x, x_row, y, cos, sin, angle_row, sign, rows, heads, dim, threads);                                          \
    }                                                                                                                       \
    EXPORT void swiglu_##S(const T* gate, int64_t gate_row, const T* up, int64_t up_row, T* y, int64_t rows, int64_t size,  \
                           int threads) {                                                                                   \
        swiglu(gate, gate_row, up, up_row, y, rows, size, threads);                                                         \
    }                                                                                                                       \
    EXPORT void swiglu_backward_##S(const T* grad, const T* gate, int64_t gate_row, const T* up, int64_t up_row,            \
                                    T* grad_gate, T* grad_up, int64_t rows, int64_t size, int threads) {                    \
        swiglu_backward(grad, gate, gate_row, up, up_row, grad_gate, grad_up, rows, size, threads);                         \
    }                                                                                                                       \
    EXPORT void attend_##S(const T* q, int64_t q_row, const T* k, int64_t k_row, const T* v, int64_t v_row, const T* cos,   \
                           const T* sin, int64_t angle_row, T* pool_k, T* pool_v, int64_t pool_head, const int32_t* own,    \
                           const int32_t* slots, const int64_t* first, const int32_t* seen, T* out, int64_t tokens,         \
                           int64_t kv_heads, int64_t group, int64_t dim, float scale, int64_t most_seen, int threads) {     \
        attend(q, q_row, k, k_row, v, v_row, cos, sin, angle_row, pool_k, pool_v, pool_head, own, slots, first, seen, out,  \
               tokens, kv_heads, group, dim, scale, most_seen, threads);                                                    \
    }                                                                                                                       \
    EXPORT void masked_softmax_##S(T* scores, const uint8_t* visible, float scale, int64_t heads, int64_t n, int64_t keys,   \
                                   int threads) {                                                                           \
        masked_softmax(scores, visible, scale, heads, n, keys, threads);                                                    \
    }                                                                                                                       \
    EXPORT void softmax_scores_backward_##S(T* spread, const T* weights, const T* grad, const T* out, float scale,          \
                                            int64_t rows, int64_t keys, int64_t dim, int threads) {                         \
        softmax_scores_backward(spread, weights, grad, out, scale, rows, keys, dim, threads);                               \
    }                                                                                                                       \
    EXPORT void add_low_rank_##S(const T* x, int64_t x_row, T* const* out, const int64_t* out_row, const int64_t* fan_out,  \
                                 int64_t layers, const T* const* a, const T* const* b, const int64_t* ranks,                \
                                 const float* scales, const int64_t* starts, const int64_t* ends, int64_t ranges,           \
                                 int64_t fan_in, int64_t most_rank, T* const* kept, int threads) {                          \
        add_low_rank(x, x_row, out, out_row, fan_out, layers, a, b, ranks, scales, starts, ends, ranges, fan_in, most_rank, \
                     kept, threads);                                                                                        \
    }                                                                                                                       \
    EXPORT void summarise_##S(const T* logits, int64_t rows, int64_t size, const float* sharpness, double* log_z,           \
                              double* entropy, double* chunks, int64_t* best, float* most, int threads) {                   \
        summarise(logits, rows, size, sharpness, log_z, entropy, chunks, best, most, threads);                       \
    }                                                                                                                       \
    EXPORT void softmax_backward_##S(const T* logits, int64_t rows, int64_t size, const float* sharpness, const float* most, \
                                     const double* log_z, const float* alpha, const float* beta, T* out, int threads) {     \
        softmax_backward(logits, rows, size, sharpness, most, log_z, alpha, beta, out, threads);                            \
    }                                                                                                                       \
    EXPORT void pick_##S(const T* logits, int64_t size, const float* sharpness, const double* log_z, const double* chunks,  \
                         const int64_t* best, const float* most, const int64_t* row_of, const double* uniforms,             \
                         int64_t* found, double* logprob, int64_t asked) {                                                  \
        pick(logits, size, sharpness, log_z, chunks, best, most, row_of, uniforms, found, logprob, asked);           \
    }

KERNELS(float, f32)
KERNELS(bf16, bf16)

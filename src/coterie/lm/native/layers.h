// Norms, rotary positions and gates, forward and back.

#pragma once

#include "numbers.h"

namespace {

// -- norms ------------------------------------------------------------------------------------------------------------

template <class T>
void rms_norm(const T* x, int64_t x_row, const T* added, T* total, const float* weight, float eps, T* y, float* inverse,
              int64_t rows, int64_t size, int threads) {
    team(threads, rows * size > PARALLEL, [=] {
#pragma omp for schedule(static)
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
    });
}

// y = x r w, r = (mean x^2 + eps)^(-1/2):  dx = r w g - x r^3 mean(x w g), and `added` to that, if it is not null
template <class T>
void rms_norm_backward(const T* grad, const T* x, int64_t x_row, const float* weight, const float* inverse, const T* added,
                       T* out, int64_t rows, int64_t size, int threads) {
    team(threads, rows * size > PARALLEL, [=] {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const T *g = grad + r * size, *in = x + r * x_row;
            float along = 0.0f, inv = inverse[r];
#pragma omp simd reduction(+ : along)
            for (int64_t i = 0; i < size; i++) along += load(g[i]) * weight[i] * load(in[i]);
            float back = along * inv * inv * inv / size;
            T* to = out + r * size;
            if (added) {
                const T* more = added + r * size;
#pragma omp simd
                for (int64_t i = 0; i < size; i++)
                    store(to[i], load(more[i]) + load(g[i]) * weight[i] * inv - load(in[i]) * back);
            } else {
#pragma omp simd
                for (int64_t i = 0; i < size; i++) store(to[i], load(g[i]) * weight[i] * inv - load(in[i]) * back);
            }
        }
    });
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
    team(threads, rows * heads * dim > PARALLEL, [=] {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t h = 0; h < heads; h++)
                rotate_head(x + r * x_row + h * dim, y + (r * heads + h) * dim, cos + r * angle_row, sin + r * angle_row, sign,
                            dim / 2);
    });
}

// -- gates ------------------------------------------------------------------------------------------------------------

template <class T>
void swiglu(const T* gate, int64_t gate_row, const T* up, int64_t up_row, T* y, int64_t rows, int64_t size, int threads) {
    team(threads, rows * size > PARALLEL, [=] {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const T *g = gate + r * gate_row, *u = up + r * up_row;
            T* out = y + r * size;
#pragma omp simd
            for (int64_t i = 0; i < size; i++) {
                float v = load(g[i]);
                store(out[i], v / (1.0f + quick_exp(-v)) * load(u[i]));
            }
        }
    });
}

// silu'(v) = s (1 + v (1 - s)), s = 1 / (1 + exp(-v))
template <class T>
void swiglu_backward(const T* grad, const T* gate, int64_t gate_row, const T* up, int64_t up_row, T* grad_gate, T* grad_up,
                     int64_t rows, int64_t size, int threads) {
    team(threads, rows * size > PARALLEL, [=] {
#pragma omp for schedule(static)
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
    });
}

// -- rows -------------------------------------------------------------------------------------------------------------

inline void gather(const char* const* rows, int64_t count, int64_t bytes, char* out, [[maybe_unused]] int threads) {
#pragma omp parallel for num_threads(threads) if (count * bytes > 4 * PARALLEL) schedule(static)
    for (int64_t r = 0; r < count; r++) std::memcpy(out + r * bytes, rows[r], bytes);
}

}  // namespace

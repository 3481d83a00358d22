// Rows of logits: what normalises them, draws from them, and the gradient of log-probabilities and entropies.

#pragma once

#include "numbers.h"

namespace {

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
// single tokens add is the caller's. Written over the logits.
template <class T>
void softmax_backward(T* logits, int64_t rows, int64_t size, const float* sharpness, const float* most,
                      const double* log_z, const float* alpha, const float* beta, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        T* row = logits + r * size;
        float high = most[r], sharp = sharpness[r], log_sum = float(log_z[r]), a = alpha[r], b = beta[r];
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            float lp = (load(row[i]) - high) * sharp - log_sum;
            store(row[i], sharp * quick_exp(lp) * (a + b * (lp < -1e4f ? -1e4f : lp)));
        }
    }
}

}  // namespace

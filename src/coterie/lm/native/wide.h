// Vectors of numbers, as wide as a register.

#pragma once

#include "numbers.h"

namespace {

// wider ones are kept in memory by compilers, at a fifth of the speed
#if defined(__AVX512F__)
constexpr int64_t WIDE = 16, SUMS = 24;  // SUMS: how many may be under way at once, so that registers hold them
#elif defined(__AVX__)
constexpr int64_t WIDE = 8, SUMS = 12;
#elif defined(__aarch64__)
constexpr int64_t WIDE = 4, SUMS = 24;
#else
constexpr int64_t WIDE = 4, SUMS = 12;
#endif
typedef float floats __attribute__((vector_size(WIDE * 4)));
typedef uint32_t words __attribute__((vector_size(WIDE * 4)));
typedef uint16_t halves __attribute__((vector_size(WIDE * 2)));

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

inline float sum_of(floats x) {
    float lanes[WIDE];
    std::memcpy(lanes, &x, sizeof x);
    for (int64_t half = WIDE / 2; half; half /= 2)
        for (int64_t i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// The sums of N vectors. Four at a time take hardly more than one.
template <int N> inline void sums_of(const floats (&x)[N], float* out) {
    int n = 0;
#ifdef __AVX__
    auto half = [](floats whole) {
#ifdef __AVX512F__
        const __m512d pairs = (__m512d)whole;
        return _mm256_add_ps((__m256)_mm512_castpd512_pd256(pairs), (__m256)_mm512_extractf64x4_pd(pairs, 1));
#else
        return (__m256)whole;
#endif
    };
    for (; n + 4 <= N; n += 4) {
        const __m256 pairs = _mm256_hadd_ps(half(x[n]), half(x[n + 1])), others = _mm256_hadd_ps(half(x[n + 2]), half(x[n + 3]));
        const __m256 all = _mm256_hadd_ps(pairs, others);
        _mm_storeu_ps(out + n, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
    }
#endif
    for (; n < N; n++) out[n] = sum_of(x[n]);
}

// sum + a * b of STEP numbers. Of bfloat16, some processors add up pairs of products without widening them first.
template <class T> constexpr int64_t STEP = WIDE;
template <class T> inline floats multiply_add(floats sum, const T* a, const T* b) { return sum + load_wide(a) * load_wide(b); }
#ifdef __AVX512BF16__
template <> constexpr int64_t STEP<bf16> = 32;
inline floats multiply_add(floats sum, const bf16* a, const bf16* b) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
}
#endif

}  // namespace

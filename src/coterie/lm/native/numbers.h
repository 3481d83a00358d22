// Numbers: storage types, their rounding, and an exponential that compilers turn into vector code.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
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

template <class T> constexpr int64_t LINE = 64 / sizeof(T);  // numbers in a line of a cache

constexpr int64_t PARALLEL = 16384;  // elements below which waking threads costs more than they save

// Let every thread of a team do `work`, which shares its loops out (omp for): of the team that is at work already, or else
// of one of `threads`, if that is `worth` waking them.
template <class F> inline void team(int threads, bool worth, F work) {
#ifdef _OPENMP
    if (omp_in_parallel()) {
        work();
        return;
    }
#endif
#pragma omp parallel num_threads(threads) if (worth)
    work();
}

}  // namespace

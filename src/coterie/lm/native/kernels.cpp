// What stands between a decoder's matrix products, on a processor: each function is one pass over memory.
//
// Storage type T is float or bfloat16 (suffixes _f32 and _bf16); arithmetic is float32. Rows are shared out among
// `threads`, and every number is computed by one thread in one order, so results do not depend on their number.
// Callers (coterie.lm.native) have checked types, shapes and strides; nothing here allocates beyond scratch space.

#include "attention.h"
#include "decoder_back.h"
#include "decoder_layer.h"
#include "layers.h"
#include "low_rank.h"
#include "products.h"
#include "sampling.h"
#include "tree.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
#define KERNELS(T, S)                                                                                                       \
    EXPORT void rms_norm_##S(const T* x, int64_t x_row, const T* added, T* total, const float* weight, float eps, T* y,     \
                             float* inverse, int64_t rows, int64_t size, int threads) {                                     \
        rms_norm(x, x_row, added, total, weight, eps, y, inverse, rows, size, threads);                                     \
    }                                                                                                                       \
    EXPORT void rms_norm_backward_##S(const T* grad, const T* x, int64_t x_row, const float* weight, const float* inverse,  \
                                      const T* added, T* out, int64_t rows, int64_t size, int threads) {                    \
        rms_norm_backward(grad, x, x_row, weight, inverse, added, out, rows, size, threads);                                \
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
                           const T* sin, int64_t angle_row, T* pool_k, T* pool_v, int64_t pool_head, const int64_t* own,    \
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
    EXPORT void low_rank_gradients_##S(const Outer<T>* jobs, int64_t count, int threads) { outer(jobs, count, threads); }   \
    EXPORT void summarise_##S(const T* logits, int64_t rows, int64_t size, const float* sharpness, double* log_z,           \
                              double* entropy, double* chunks, int64_t* best, float* most, int threads) {                   \
        summarise(logits, rows, size, sharpness, log_z, entropy, chunks, best, most, threads);                       \
    }                                                                                                                       \
    EXPORT void softmax_backward_##S(T* logits, int64_t rows, int64_t size, const float* sharpness, const float* most,      \
                                     const double* log_z, const float* alpha, const float* beta, int threads) {             \
        softmax_backward(logits, rows, size, sharpness, most, log_z, alpha, beta, threads);                                 \
    }                                                                                                                       \
    EXPORT void gather_##S(const char* const* rows, int64_t count, int64_t bytes, char* out, int threads) {                  \
        gather(rows, count, bytes, out, threads);                                                                           \
    }                                                                                                                       \
    EXPORT void pick_##S(const T* logits, int64_t size, const float* sharpness, const double* log_z, const double* chunks,  \
                         const int64_t* best, const float* most, const int64_t* row_of, const double* uniforms,             \
                         int64_t* found, double* logprob, int64_t asked) {                                                  \
        pick(logits, size, sharpness, log_z, chunks, best, most, row_of, uniforms, found, logprob, asked);           \
    }

KERNELS(float, f32)
KERNELS(bf16, bf16)

// -- float32 alone ------------------------------------------------------------------------------------------------------

// Outputs of a panel; 0: this was not compiled for a processor on which our products are known to be quicker.
EXPORT int64_t panel_f32() {
#ifdef __FMA__
    return PANEL;
#else
    return 0;
#endif
}
EXPORT void pack_panels_f32(const float* w, int64_t out_step, int64_t size_step, int64_t out, int64_t size, float* to,
                            int threads) {
    pack_panels(w, out_step, size_step, out, size, to, threads);
}
EXPORT void product_f32(const float* const* x, const int64_t* x_row, const int64_t* sizes, int64_t parts,
                        const float* panels, const float* bias, int64_t rows, int64_t out, float* y, int threads) {
    product({x, x_row, sizes, parts}, panels, bias, rows, out, y, threads);
}
EXPORT void attend_tree_f32(const float* q, int64_t q_row, const float* k, int64_t k_row, const float* v, int64_t v_row,
                            const int32_t* slots, const int64_t* first, const int32_t* seen, float* out, int64_t tokens,
                            int64_t kv_heads, int64_t group, int64_t dim, float scale, int64_t most_seen, int threads) {
    attend_tree({q, q_row, k, k_row, v, v_row, kv_heads, group, dim, scale}, {slots, first, seen, tokens, most_seen}, out,
                threads);
}
EXPORT void attend_tree_backward_f32(const float* q, int64_t q_row, const float* k, int64_t k_row, const float* v,
                                     int64_t v_row, const int32_t* slots, const int64_t* first, const int32_t* seen,
                                     const float* grad, const float* out, float* grad_q, float* grad_k, float* grad_v,
                                     int64_t tokens, int64_t kv_heads, int64_t group, int64_t dim, float scale,
                                     int64_t most_seen, int threads) {
    const Seen see{slots, first, seen, tokens, most_seen};
    attend_tree_backward({q, q_row, k, k_row, v, v_row, kv_heads, group, dim, scale}, see, TreeWork(see, kv_heads * group), grad,
                         out, grad_q, grad_k, grad_v, threads);
}
EXPORT void decoder_layer_f32(const DecoderLayer* layer, const DecoderPass* pass, const DecoderCall* call) {
    decoder_layer(*layer, *pass, *call);
}
EXPORT void decoder_layer_back_f32(const LayerBack* layer, const PassBack* pass, const CallBack* call) {
    decoder_layer_back(*layer, *pass, *call);
}

// Products with frozen matrices: y = x W^T + b, in float32.
//
// W (out, size) is kept in panels of PANEL outputs: panel p holds W[p PANEL + c][k] at (p size + k) PANEL + c, and 0 beyond
// the last output. A tile of TILE rows and one panel is summed in registers, k by k, so that a row's result depends
// neither on the rows beside it nor on the number of threads.

#pragma once

#include <algorithm>

#include "wide.h"

namespace {

constexpr int64_t PANEL = 2 * WIDE;
constexpr int TILE = SUMS / 2;
constexpr int64_t ROWS = 384;  // that are multiplied by one panel after another, and so should stay in a cache

// x in parts that lie side by side: part i has sizes[i] columns and rows x_row[i] apart
struct Parts {
    const float* const* x;
    const int64_t *x_row, *sizes;
    int64_t count;
};

// What a tile brings nearer meanwhile: from `next` on, PANEL numbers every `every` steps; nothing, if that is null.
struct Ahead {
    const float* next;
    int64_t every;
};

template <int N>
void tile(const Parts& in, int64_t first, const float* panel, const float* bias, float* y, int64_t y_row, int64_t columns,
          Ahead ahead) {
    floats left[N], right[N];
    for (int n = 0; n < N; n++) {
        left[n] = bias ? load_wide(bias) : floats{};
        right[n] = bias ? load_wide(bias + WIDE) : floats{};
    }
    for (int64_t part = 0; part < in.count; part++) {
        const int64_t row = in.x_row[part], size = in.sizes[part];
        const float* x = in.x[part] + first * row;
        for (int64_t k = 0; k < size;) {
            const int64_t stop = ahead.next ? std::min(size, k + ahead.every) : size;
            if (ahead.next) {
                for (int64_t i = 0; i < PANEL; i += LINE<float>) __builtin_prefetch(ahead.next + i, 0, 2);
                ahead.next += PANEL;
            }
            for (; k < stop; k++, panel += PANEL) {
                const floats a = load_wide(panel), b = load_wide(panel + WIDE);
                for (int n = 0; n < N; n++) {
                    left[n] += x[n * row + k] * a;
                    right[n] += x[n * row + k] * b;
                }
            }
        }
    }
    for (int n = 0; n < N; n++, y += y_row) {
        if (columns == PANEL) {
            store_wide(y, left[n]);
            store_wide(y + WIDE, right[n]);
        } else {
            float out[PANEL];
            store_wide(out, left[n]);
            store_wide(out + WIDE, right[n]);
            std::memcpy(y, out, columns * sizeof(float));
        }
    }
}

using Tile = void (*)(const Parts&, int64_t, const float*, const float*, float*, int64_t, int64_t, Ahead);

template <int N> Tile tile_of(int64_t rows) {
    if constexpr (N == 1)
        return tile<1>;
    else
        return rows == N ? tile<N> : tile_of<N - 1>(rows);
}

void product(const Parts& in, const float* panels, const float* bias, int64_t rows, int64_t out, float* y, int threads) {
    int64_t size = 0;
    for (int64_t part = 0; part < in.count; part++) size += in.sizes[part];
    const int64_t wide = (out + PANEL - 1) / PANEL, most = std::max<int64_t>(rows, 1);
    // blocks of equal height, and enough of them that every thread has several pieces
    int64_t blocks = (most + ROWS - 1) / ROWS;
    while (most > 8 * TILE * blocks && wide * blocks < 4 * threads) blocks *= 2;
    const int64_t together = (most + blocks - 1) / blocks;
    blocks = (rows + together - 1) / together;
    // who is done takes the next piece: shared out beforehand, a thread that was interrupted keeps all others waiting
    const int64_t pieces = blocks * wide;
    const auto work = [=](int64_t piece, int64_t following) {
        const int64_t block = piece / wide, p = piece % wide, end = std::min(rows, (block + 1) * together);
        const float* panel = panels + p * PANEL * size;
        const int64_t columns = std::min(PANEL, out - p * PANEL);
        // tiles of nearly equal height
        const int64_t tiles = (end - block * together + TILE - 1) / TILE;
        // few rows are done with a panel sooner than the next one is read from memory, so it is asked for meanwhile, a part
        // by each tile
        const float* next = tiles > 1 && following >= 0 ? panels + following % wide * PANEL * size : nullptr;
        for (int64_t at = block * together, left = tiles; left; left--) {
            const int64_t height = (end - at + left - 1) / left;
            tile_of<TILE>(height)(in, at, panel, bias ? bias + p * PANEL : nullptr, y + at * out + p * PANEL, out, columns,
                                  {next, tiles});
            if (next) next += size / tiles * PANEL;
            at += height;
        }
    };
    team(threads, size * out > PARALLEL, [=] {
        // a thread takes a piece before it does the one it has, so that it knows what to ask for
        int64_t held = -1;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t piece = 0; piece < pieces; piece++) {
            if (held >= 0) work(held, piece);
            held = piece;
        }
        if (held >= 0) work(held, -1);
#pragma omp barrier
    });
}

void pack_panels(const float* w, int64_t out_step, int64_t size_step, int64_t out, int64_t size, float* to, int threads) {
    const int64_t wide = (out + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < wide; p++)
        for (int64_t k = 0; k < size; k++)
            for (int64_t c = 0; c < PANEL; c++) {
                const int64_t o = p * PANEL + c;
                to[(p * size + k) * PANEL + c] = o < out ? w[o * out_step + k * size_step] : 0.0f;
            }
}

}  // namespace

// Products of many rows: y = x W^T, bound by arithmetic, with W read as it lies.
//
// Activations stand in panels, of each feature the numbers of PANEL tokens side by side. A tile of y is a few rows of W
// by one panel of x, and stays in registers as in BLIS (van Zee and van de Geijn 2015): every number of W is spread
// over a vector and meets all of a panel's tokens. What comes out is a panel again, so that chains of factors, norms,
// activations and sums go on from it, and no weight has to be laid out anew. A tile of 6 x 64 needs 24 vectors of sums,
// 4 of x and one of W: the 32 registers of AVX-512; of 6 x 16, the 16 of AVX2.
#pragma once
#include <algorithm>

#include "products.h"

constexpr int TILE_ROWS = 6;                     // rows of W at a time
constexpr int TILE_PARTS = LANES == 16 ? 4 : 2;  // vectors of tokens beside each other
constexpr int64_t PANEL = TILE_PARTS * LANES;    // tokens that stand side by side
constexpr int64_t DEPTH = 384;                   // most numbers added up one after the other: rounding adds up, too
constexpr int64_t BLOCK = 1 << 14;               // numbers of W, about, that a thread takes at a time

// Rows of a matrix that are spread over vectors: number k of row i lies at `at[i * row + k * step]`.
struct Spread {
    const float *at;
    int64_t row, step;
};

// What becomes of a tile of sums: whether it is added to what stands there, and a number for each row (a bias), or
// null.
struct Sink {
    bool adds;
    const float *bias;
};

// What stands there may be far larger than what is added: it comes last, so that it is rounded to but once.
static inline void leave(lanes sum, lanes &to, int row, Sink sink) {
    const lanes found = sink.bias ? sum + sink.bias[row] : sum;
    to = sink.adds ? to + found : found;
}

// y (ROWS, PARTS vectors; PANEL from row to row) = a (ROWS, depth) x (depth, PARTS vectors; PANEL apart).
template <int ROWS, int PARTS>
static inline void tile_of_sums(Spread a, const float *x, int64_t depth, float *y, Sink sink) {
    lanes sums[ROWS][PARTS] = {};
    for (int64_t k = 0; k < depth; k++) {
        lanes right[PARTS];
        for (int part = 0; part < PARTS; part++) right[part] = *(const lanes *)(x + k * PANEL + part * LANES);
        for (int row = 0; row < ROWS; row++)
            for (int part = 0; part < PARTS; part++) sums[row][part] += a.at[row * a.row + k * a.step] * right[part];
    }
    for (int row = 0; row < ROWS; row++)
        for (int part = 0; part < PARTS; part++)
            leave(sums[row][part], *(lanes *)(y + row * PANEL + part * LANES), row, sink);
}

template <int ROWS>
static inline void parts_of_sums(Spread a, const float *x, int64_t depth, float *y, int64_t parts, Sink sink) {
    if constexpr (TILE_PARTS == 4) {
        if (parts == 4) return tile_of_sums<ROWS, 4>(a, x, depth, y, sink);
        if (parts == 3) return tile_of_sums<ROWS, 3>(a, x, depth, y, sink);
    }
    if (parts == 2) return tile_of_sums<ROWS, 2>(a, x, depth, y, sink);
    tile_of_sums<ROWS, 1>(a, x, depth, y, sink);
}

template <int ROWS>
static inline void finish(const float *sums, float *y, int64_t parts, Sink sink) {
    for (int row = 0; row < ROWS; row++)
        for (int64_t at = row * PANEL; at < row * PANEL + parts * LANES; at += LANES)
            leave(*(const lanes *)(sums + at), *(lanes *)(y + at), row, sink);
}

// y (rows, `parts` vectors) = a (rows, depth) x (depth, `parts` vectors), any number of rows.
static void rows_of_sums(Spread a, const float *x, int64_t depth, float *y, int64_t rows, int64_t parts, Sink sink) {
    const int64_t stretches = std::max<int64_t>(1, (depth + DEPTH - 1) / DEPTH);
    int64_t i = 0;
    auto tile = [&]<int ROWS>() {
        const Spread own = {a.at + i * a.row, a.row, a.step};
        const Sink end = {sink.adds, sink.bias ? sink.bias + i : nullptr};
        float *to = y + i * PANEL;
        i += ROWS;
        if (stretches == 1) return parts_of_sums<ROWS>(own, x, depth, to, parts, end);
        float partial[ROWS * PANEL];
        for (int64_t stretch = 0; stretch < stretches; stretch++) {
            const int64_t from = depth * stretch / stretches, next = depth * (stretch + 1) / stretches;
            parts_of_sums<ROWS>({own.at + from * a.step, a.row, a.step}, x + from * PANEL, next - from, partial, parts,
                                {stretch > 0, nullptr});
        }
        finish<ROWS>(partial, to, parts, end);
    };
    while (i + TILE_ROWS <= rows) tile.template operator()<TILE_ROWS>();
    if (i + 4 <= rows) tile.template operator()<4>();
    if (i + 2 <= rows) tile.template operator()<2>();
    if (i < rows) tile.template operator()<1>();
}

// Tokens in panels: of each sequence `tokens`, the last panel filled with zeros.
struct Panels {
    int64_t sequences, tokens;

    int64_t of_sequence() const { return (tokens + PANEL - 1) / PANEL; }
    int64_t count() const { return sequences * of_sequence(); }
    int64_t first(int64_t panel) const { return panel % of_sequence() * PANEL; }  // token of its sequence
    int64_t filled(int64_t panel) const { return std::min(PANEL, tokens - first(panel)); }
    int64_t parts(int64_t panel) const { return (filled(panel) + LANES - 1) / LANES; }
    int64_t row(int64_t panel) const { return panel / of_sequence() * tokens + first(panel); }  // of all sequences'
};

// Rows [from, to) of one product for one panel; `adds` to what stands there.
static void rows_of_panel(const Piece &p, int64_t from, int64_t to, int64_t panel, int64_t parts, bool adds) {
    const float *x = p.source.at + panel * p.source.stride * PANEL;
    float *y = p.sink.at + (panel * p.sink.stride + from) * PANEL;
    rows_of_sums({p.weight + from * p.columns, p.columns, 1}, x, p.columns, y, to - from, parts,
                 {adds, p.bias ? p.bias + from : nullptr});
}

static int64_t block_rows(const LayoutRow &r) { return (BLOCK / r.columns / TILE_ROWS + 1) * TILE_ROWS; }
static int64_t blocks_of(const LayoutRow &r) { return (r.rows + block_rows(r) - 1) / block_rows(r); }

// All products of a group for all panels, by all threads of the parallel region that calls it; `adds` to the result
// what the last products give, instead of putting it there.
static void share_panels(const Group &group, const Buffers &buffers, const Panels &panels, bool adds) {
    for (const auto &stage : group.stages) {
        int64_t blocks = 0;
        for (const LayoutRow &r : stage) blocks += blocks_of(r);
        // Panel by panel: a panel stays in the second cache while all of W passes by.
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < blocks * panels.count(); item++) {
            const int64_t panel = item / blocks;
            int64_t block = item % blocks;
            for (const LayoutRow &r : stage) {
                const int64_t own = blocks_of(r);
                if (block < own) {
                    const Piece p = group.piece(r, buffers, PANEL);
                    const int64_t from = block * block_rows(r), to = std::min(from + block_rows(r), r.rows);
                    rows_of_panel(p, from, to, panel, panels.parts(panel), adds && r.scratch_at < 0);
                    break;
                }
                block -= own;
            }
        }
    }
}

// `chains` for many rows.
static void chains_of_many(const Group &group, const float *x, int64_t count, float *y) {
    const Panels panels = {1, count};
    const int64_t in = group.in_features, scratch = group.scratch, out = group.out_features,
                  size = panels.count() * PANEL;
    const Memory room(size * (in + scratch + out));
    const Buffers buffers = {{room.at, in}, {room.at + size * in, scratch}, {room.at + size * (in + scratch), out}};
#pragma omp parallel num_threads(at::get_num_threads())
    {
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels.count(); panel++)
            from_rows(x + panels.row(panel) * in, in, panels.filled(panel), in, PANEL,
                      buffers.input.at + panel * in * PANEL);
        share_panels(group, buffers, panels, false);
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels.count(); panel++)
            to_rows(buffers.result.at + panel * out * PANEL, PANEL, panels.filled(panel), out,
                    y + panels.row(panel) * out, out);
    }
}

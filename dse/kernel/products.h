// Products of few rows by large weights: y = x W^T, where nearly all time is reading W once.
//
// Matrix libraries are tuned for many rows; with one to sixteen they leave up to half of the memory's speed unused.
// Here every thread reads whole rows of W from one end of its share to the other, a few side by side, and all products
// that follow from one input run in one parallel region: a chain x R^T L^T costs a barrier more than one product, not a
// call.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <omp.h>

#include <memory>
#include <vector>

#include "lanes.h"

struct Operand {
    float *at;
    int64_t stride;
};

// One product: `rows` of x by the same columns of `source` into `sink`.
struct Piece {
    const float *weight;  // (rows, columns), row by row
    const float *bias;    // (rows), or null
    int64_t rows, columns;
    Operand source, sink;
};

constexpr int64_t LINE = 16;    // floats in a cache line
constexpr int64_t AHEAD = 512;  // floats that are fetched ahead at least: memory answers after as long as that takes

// OUT rows of the weight by IN rows of x. Accumulators fill the registers, so that each load of W serves all rows of x.
// The processor's own prefetchers start anew with every row and page; asking for what comes next keeps memory busy.
template <int OUT, int IN>
static inline void tile(const float *weight, const float *bias, int64_t columns, Operand x, float *y,
                        int64_t y_stride) {
    lanes sums[OUT][IN];
    for (int o = 0; o < OUT; o++)
        for (int i = 0; i < IN; i++) sums[o][i] = lanes{};
    const int64_t tile_size = OUT * columns, next = (AHEAD / tile_size + 1) * tile_size;
    int64_t k = 0;
    auto step = [&](int64_t at) {
        lanes w[OUT];
        for (int o = 0; o < OUT; o++) w[o] = *(const lanes *)(weight + o * columns + at);
        for (int i = 0; i < IN; i++) {
            const lanes given = *(const lanes *)(x.at + i * x.stride + at);
            for (int o = 0; o < OUT; o++) sums[o][i] += w[o] * given;
        }
    };
    for (; k + LINE <= columns; k += LINE) {
        for (int o = 0; o < OUT; o++) __builtin_prefetch(weight + o * columns + k + next);
        for (int64_t at = k; at < k + LINE; at += LANES) step(at);
    }
    for (; k + LANES <= columns; k += LANES) step(k);
    for (int i = 0; i < IN; i++)
        for (int begin = 0; begin < OUT; begin += 4) {
            const int end = begin + 4 < OUT ? begin + 4 : OUT;
            quad parts[4] = {};
            for (int o = begin; o < end; o++) parts[o - begin] = folded(sums[o][i]);
            const quad found = totals(parts[0], parts[1], parts[2], parts[3]);
            for (int o = begin; o < end; o++) {
                float sum = found[o - begin] + (bias ? bias[o] : 0.0f);
                for (int64_t rest = k; rest < columns; rest++)
                    sum += weight[o * columns + rest] * x.at[i * x.stride + rest];
                y[i * y_stride + o] = sum;
            }
        }
}

template <int OUT>
static inline void rows_of_x(const float *weight, const float *bias, int64_t columns, Operand x, int64_t count,
                             float *y, int64_t y_stride) {
    for (int64_t i = 0; i < count; i += 4) {
        const Operand part = {x.at + i * x.stride, x.stride};
        float *to = y + i * y_stride;
        switch (count - i) {
            case 1:
                tile<OUT, 1>(weight, bias, columns, part, to, y_stride);
                break;
            case 2:
                tile<OUT, 2>(weight, bias, columns, part, to, y_stride);
                break;
            case 3:
                tile<OUT, 3>(weight, bias, columns, part, to, y_stride);
                break;
            default:
                tile<OUT, 4>(weight, bias, columns, part, to, y_stride);
        }
    }
}

static void some_rows(const Piece &p, int64_t from, int64_t to, int64_t count) {
    auto weight = [&](int64_t row) { return p.weight + row * p.columns; };
    auto bias = [&](int64_t row) { return p.bias ? p.bias + row : nullptr; };
    int64_t row = from;
    if (count == 1)
        for (; row + 8 <= to; row += 8)
            tile<8, 1>(weight(row), bias(row), p.columns, p.source, p.sink.at + row, p.sink.stride);
    else
        for (; row + 3 <= to; row += 3)
            rows_of_x<3>(weight(row), bias(row), p.columns, p.source, count, p.sink.at + row, p.sink.stride);
    for (; row < to; row++)
        rows_of_x<1>(weight(row), bias(row), p.columns, p.source, count, p.sink.at + row, p.sink.stride);
}

// The first row of a piece that begins at or behind `entry` of its stage, whose entries up to the piece are `start`.
static inline int64_t first_row(const Piece &p, int64_t start, int64_t entry) {
    const int64_t row = entry <= start ? 0 : (entry - start + p.columns - 1) / p.columns;
    return row < p.rows ? row : p.rows;
}

// Every thread takes the same share of a stage's entries: what counts is how much of W it reads.
static void stage_share(const std::vector<Piece> &stage, int64_t count, int64_t thread, int64_t threads) {
    int64_t entries = 0, start = 0;
    for (const Piece &p : stage) entries += p.rows * p.columns;
    const int64_t low = entries * thread / threads, high = entries * (thread + 1) / threads;
    for (const Piece &p : stage) {
        some_rows(p, first_row(p, start, low), first_row(p, start, high), count);
        start += p.rows * p.columns;
    }
}

using Stages = std::vector<std::vector<Piece>>;

static void run(const Stages &stages, int64_t count) {
#pragma omp parallel num_threads(at::get_num_threads())
    for (size_t stage = 0; stage < stages.size(); stage++) {
        if (stage) {
#pragma omp barrier
        }
        stage_share(stages[stage], count, omp_get_thread_num(), omp_get_num_threads());
    }
}

// A row of a layout: where a product finds its numbers. Places are counted in numbers from the begin of their tensor.
struct LayoutRow {
    int64_t stage, rows, columns;
    int64_t weight_at;   // in the weights
    int64_t bias_at;     // in the weights; -1: none
    int64_t source_at;   // in a row of the scratch; -1: reads x
    int64_t scratch_at;  // in a row of the scratch; -1: writes to the result
    int64_t result_at;   // in a row of the result, where it writes to that
};
constexpr int64_t LAYOUT_COLUMNS = sizeof(LayoutRow) / sizeof(int64_t);

static bool lies_within(int64_t at, int64_t size, int64_t whole) { return at >= 0 && size >= 0 && at + size <= whole; }

// Chains of products that begin with one input x (..., columns): every matrix of `weights`, which is one flat tensor,
// is multiplied as its row of `layout` says. Returns (..., out_features), the results of all chains side by side.
static at::Tensor chains(const at::Tensor &given, const at::Tensor &weights, const at::Tensor &layout,
                         int64_t out_features, int64_t scratch) {
    TORCH_CHECK(given.scalar_type() == at::kFloat && weights.scalar_type() == at::kFloat && weights.is_contiguous(),
                "input and weights must be float32, and weights contiguous");
    TORCH_CHECK(layout.scalar_type() == at::kLong && layout.is_contiguous() && layout.size(-1) == LAYOUT_COLUMNS,
                "a layout has ", LAYOUT_COLUMNS, " integers for each product");
    const at::Tensor x = given.contiguous();
    const int64_t in_features = x.size(-1), count = x.numel() / in_features, size = weights.numel();
    auto sizes = x.sizes().vec();
    sizes.back() = out_features;
    const at::Tensor y = at::empty(sizes, x.options());
    const std::unique_ptr<float[]> between(scratch ? new float[count * scratch] : nullptr);

    const float *numbers = weights.const_data_ptr<float>();
    const Operand input = {const_cast<float *>(x.const_data_ptr<float>()), in_features};
    const auto *rows = reinterpret_cast<const LayoutRow *>(layout.const_data_ptr<int64_t>());
    Stages stages;
    for (const LayoutRow *r = rows; r < rows + layout.size(0); r++) {
        const bool reads_x = r->source_at < 0, writes_y = r->scratch_at < 0;
        TORCH_CHECK(
            lies_within(r->weight_at, r->rows * r->columns, size) && r->columns > 0 &&
                (r->bias_at < 0 || lies_within(r->bias_at, r->rows, size)) &&
                lies_within(reads_x ? 0 : r->source_at, r->columns, reads_x ? in_features : scratch) &&
                lies_within(writes_y ? r->result_at : r->scratch_at, r->rows, writes_y ? out_features : scratch),
            "a product must lie within its tensors");
        TORCH_CHECK(r->stage == (int64_t)stages.size() || r->stage + 1 == (int64_t)stages.size(),
                    "products must come by stage");
        if (r->stage == (int64_t)stages.size()) stages.emplace_back();
        stages.back().push_back({numbers + r->weight_at, r->bias_at < 0 ? nullptr : numbers + r->bias_at, r->rows,
                                 r->columns, reads_x ? input : Operand{between.get() + r->source_at, scratch},
                                 writes_y ? Operand{y.mutable_data_ptr<float>() + r->result_at, out_features}
                                          : Operand{between.get() + r->scratch_at, scratch}});
    }
    run(stages, count);
    return y;
}

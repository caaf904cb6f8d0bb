// Products of few rows by large weights: y = x W^T, where nearly all time is reading W once.
//
// Matrix libraries are tuned for many rows; with one to sixteen they leave up to half of the memory's speed unused.
// Here every thread reads its share of W from one end to the other, and all products that follow from one input run in
// one parallel region: a chain x R^T L^T costs a barrier more than one product, not a call.
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

// One product: all rows of `source`, times `weight`, into `sink`.
struct Piece {
    const float *weight;  // (rows, columns), row by row
    const float *bias;    // (rows), or null
    int64_t rows, columns;
    Operand source, sink;
};

constexpr int64_t LINE = 16;  // floats in a cache line

// Some rows of the weight by one row of x, y[row - from] for each: W from one end to the other, a row at a time, which
// is what the processor's own prefetchers are best at. Reading eight rows side by side, or asking for what comes next,
// takes up to half as long again.
static void one_row_of_x(const Piece &p, int64_t from, int64_t to) {
    const int64_t columns = p.columns;
    const float *x = p.source.at;
    for (int64_t row = from; row < to; row += 4) {
        const int64_t count = to - row < 4 ? to - row : 4;
        quad parts[4] = {};
        float rest[4] = {};
        for (int64_t o = 0; o < count; o++) {
            const float *weight = p.weight + (row + o) * columns;
            lanes even = {}, odd = {};
            int64_t k = 0;
            for (; k + 2 * LANES <= columns; k += 2 * LANES) {
                even += *(const lanes *)(weight + k) * *(const lanes *)(x + k);
                odd += *(const lanes *)(weight + k + LANES) * *(const lanes *)(x + k + LANES);
            }
            for (; k + LANES <= columns; k += LANES) even += *(const lanes *)(weight + k) * *(const lanes *)(x + k);
            for (; k < columns; k++) rest[o] += weight[k] * x[k];
            parts[o] = folded(even + odd);
        }
        const quad found = totals(parts[0], parts[1], parts[2], parts[3]);
        for (int64_t o = 0; o < count; o++) p.sink.at[row + o] = found[o] + rest[o] + (p.bias ? p.bias[row + o] : 0.0f);
    }
}

// OUT rows of the weight by IN rows of x, whose sums fill the registers, so that a load serves several products.
template <int OUT, int IN>
static inline void tile(const float *weight, const float *bias, int64_t columns, Operand x, float *y,
                        int64_t y_stride) {
    lanes sums[OUT][IN];
    for (int o = 0; o < OUT; o++)
        for (int i = 0; i < IN; i++) sums[o][i] = lanes{};
    int64_t k = 0;
    for (; k + LANES <= columns; k += LANES) {
        lanes w[OUT];
        for (int o = 0; o < OUT; o++) w[o] = *(const lanes *)(weight + o * columns + k);
        for (int i = 0; i < IN; i++) {
            const lanes given = *(const lanes *)(x.at + i * x.stride + k);
            for (int o = 0; o < OUT; o++) sums[o][i] += w[o] * given;
        }
    }
    constexpr int ALL = OUT * IN;
    for (int first = 0; first < ALL; first += 4) {
        quad parts[4] = {};
        for (int n = first; n < first + 4 && n < ALL; n++) parts[n - first] = folded(sums[n / IN][n % IN]);
        const quad found = totals(parts[0], parts[1], parts[2], parts[3]);
        for (int n = first; n < first + 4 && n < ALL; n++) {
            const int o = n / IN, i = n % IN;
            float sum = found[n - first] + (bias ? bias[o] : 0.0f);
            for (int64_t rest = k; rest < columns; rest++)
                sum += weight[o * columns + rest] * x.at[i * x.stride + rest];
            y[i * y_stride + o] = sum;
        }
    }
}

template <int OUT>
static inline void rows_of_x(const Piece &p, int64_t row, int64_t count) {
    const float *weight = p.weight + row * p.columns, *bias = p.bias ? p.bias + row : nullptr;
    for (int64_t i = 0; i < count; i += 4) {
        const Operand part = {p.source.at + i * p.source.stride, p.source.stride};
        float *to = p.sink.at + row + i * p.sink.stride;
        switch (count - i) {
            case 1:
                tile<OUT, 1>(weight, bias, p.columns, part, to, p.sink.stride);
                break;
            case 2:
                tile<OUT, 2>(weight, bias, p.columns, part, to, p.sink.stride);
                break;
            case 3:
                tile<OUT, 3>(weight, bias, p.columns, part, to, p.sink.stride);
                break;
            default:
                tile<OUT, 4>(weight, bias, p.columns, part, to, p.sink.stride);
        }
    }
}

constexpr int64_t THIN = 512;                // columns up to which rows of W are best read one at a time
constexpr int SIDE_BY_SIDE = LANES / 4 + 2;  // rows otherwise: with four rows of x, as many sums as fit the registers

static void some_rows(const Piece &p, int64_t from, int64_t to, int64_t count) {
    if (count == 1) return one_row_of_x(p, from, to);
    int64_t row = from;
    if (p.columns > THIN)
        for (; row + SIDE_BY_SIDE <= to; row += SIDE_BY_SIDE) rows_of_x<SIDE_BY_SIDE>(p, row, count);
    for (; row < to; row++) rows_of_x<1>(p, row, count);
}

// The first row of a piece that begins at or behind `entry` of its stage, whose entries up to the piece are `start`.
static inline int64_t first_row(const Piece &p, int64_t start, int64_t entry) {
    const int64_t row = entry <= start ? 0 : (entry - start + p.columns - 1) / p.columns;
    return row < p.rows ? row : p.rows;
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

// Where products that follow from one input read and write.
struct Buffers {
    Operand input, scratch, result;
};

// What multiplies many rows; numbered as in `KernelChains`.
enum class ManyRows : int64_t { torch, onednn, panels };

// Products that follow from one input, by stage: those of a stage read what earlier ones wrote.
struct Group {
    at::Tensor weights;  // held, so that they outlive the group
    std::vector<std::vector<LayoutRow>> stages;
    int64_t in_features, out_features, scratch;
    ManyRows many = ManyRows::torch;

    Piece piece(const LayoutRow &r, const Buffers &b) const {
        const float *numbers = weights.const_data_ptr<float>();
        return {numbers + r.weight_at,
                r.bias_at < 0 ? nullptr : numbers + r.bias_at,
                r.rows,
                r.columns,
                r.source_at < 0 ? b.input : Operand{b.scratch.at + r.source_at, b.scratch.stride},
                r.scratch_at < 0 ? Operand{b.result.at + r.result_at, b.result.stride}
                                 : Operand{b.scratch.at + r.scratch_at, b.scratch.stride}};
    }
};

static ManyRows many_rows(int64_t number) {
    TORCH_CHECK(number >= 0 && number <= 2, "many rows are multiplied in one of three ways, but got ", number);
    return (ManyRows)number;
}

static bool lies_within(int64_t at, int64_t size, int64_t whole) { return at >= 0 && size >= 0 && at + size <= whole; }

static Group group_of(const at::Tensor &weights, const at::Tensor &layout, int64_t in_features, int64_t out_features,
                      int64_t scratch) {
    TORCH_CHECK(weights.scalar_type() == at::kFloat && weights.is_contiguous(),
                "weights must be float32 and contiguous");
    TORCH_CHECK(layout.scalar_type() == at::kLong && layout.is_contiguous() && layout.size(-1) == LAYOUT_COLUMNS,
                "a layout has ", LAYOUT_COLUMNS, " integers for each product");
    const int64_t size = weights.numel();
    Group group = {weights, {}, in_features, out_features, scratch};
    const auto *rows = reinterpret_cast<const LayoutRow *>(layout.const_data_ptr<int64_t>());
    for (const LayoutRow *r = rows; r < rows + layout.size(0); r++) {
        const bool reads_x = r->source_at < 0, writes_y = r->scratch_at < 0;
        TORCH_CHECK(
            lies_within(r->weight_at, r->rows * r->columns, size) && r->columns > 0 &&
                (r->bias_at < 0 || lies_within(r->bias_at, r->rows, size)) &&
                lies_within(reads_x ? 0 : r->source_at, r->columns, reads_x ? in_features : scratch) &&
                lies_within(writes_y ? r->result_at : r->scratch_at, r->rows, writes_y ? out_features : scratch),
            "a product must lie within its tensors");
        TORCH_CHECK(r->stage == (int64_t)group.stages.size() || r->stage + 1 == (int64_t)group.stages.size(),
                    "products must come by stage");
        if (r->stage == (int64_t)group.stages.size()) group.stages.emplace_back();
        group.stages.back().push_back(*r);
    }
    return group;
}

// What one thread does of a group, for `count` rows of x: in every stage each reads as many numbers of W as the others.
// Others may still be at work on the last stage when it returns.
static void share(const Group &group, const Buffers &buffers, int64_t count, int64_t thread, int64_t threads) {
    bool is_first = true;
    for (const auto &stage : group.stages) {
        if (!is_first) {
#pragma omp barrier
        }
        is_first = false;
        int64_t entries = 0, start = 0;
        for (const LayoutRow &r : stage) entries += r.rows * r.columns;
        const int64_t low = entries * thread / threads, high = entries * (thread + 1) / threads;
        for (const LayoutRow &r : stage) {
            const Piece p = group.piece(r, buffers);
            some_rows(p, first_row(p, start, low), first_row(p, start, high), count);
            start += p.rows * p.columns;
        }
    }
}

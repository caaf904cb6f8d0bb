// Products of few rows by large weights: y = x W^T, where nearly all time is reading W once.
//
// Matrix libraries are tuned for many rows of x; with one to sixteen they leave up to half of the memory's speed
// unused. Here every thread reads its share of W from one end to the other, and all products that follow from one input
// run in one parallel region: a chain x R^T L^T costs a barrier more than one product, not a call.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <omp.h>

#include <memory>
#include <vector>

#include "few_rows.h"

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

// Where products that follow from one input read and write; tokens stand side by side.
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

    // Where a product reads and writes, for tokens that stand `side` by side.
    Piece piece(const LayoutRow &r, const Buffers &b, int64_t side) const {
        const float *numbers = weights.const_data_ptr<float>();
        auto at = [&](const Operand &whole, int64_t feature) {
            return Operand{whole.at + feature * side, whole.stride};
        };
        return {numbers + r.weight_at,
                r.bias_at < 0 ? nullptr : numbers + r.bias_at,
                r.rows,
                r.columns,
                r.source_at < 0 ? b.input : at(b.scratch, r.source_at),
                r.scratch_at < 0 ? at(b.result, r.result_at) : at(b.scratch, r.scratch_at)};
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

// What one thread does of a group, for tokens that stand `side` by side: in every stage each reads as many numbers of W
// as the others. Others may still be at work on the last stage when it returns.
static void share(const Group &group, const Buffers &buffers, int64_t side, int64_t thread, int64_t threads) {
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
            const Piece p = group.piece(r, buffers, side);
            some_rows(p, first_row(p, start, low), first_row(p, start, high), side);
            start += p.rows * p.columns;
        }
    }
}

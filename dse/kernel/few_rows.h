// Rows of a weight by a few rows of x, where nearly all time is reading the weight once.
#pragma once
#include <cstdint>
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

constexpr int64_t WIDEST = LANES < 8 ? 8 : LANES;  // rows of x that make one vector

// Several rows of x, turned round: number k of all of them is one vector, each number of W is spread over a vector and
// meets all rows of x at once, and nothing has to be added up across a vector.
struct Turned {
    std::vector<float> numbers;  // (columns, width)
    const float *of = nullptr;   // the rows they were made from
    int64_t columns = 0, width = 0;

    void turn(Operand x, int64_t count, int64_t size) {
        if (of == x.at && columns == size) return;
        of = x.at, columns = size, width = count <= 8 ? 8 : WIDEST;
        numbers.resize(columns * width);
        for (int64_t k = 0; k < columns; k++)
            for (int64_t i = 0; i < width; i++) numbers[k * width + i] = i < count ? x.at[i * x.stride + k] : 0.0f;
    }
};

constexpr int SPREAD_ROWS = 12;       // rows of W at a time: enough sums to wait for none of them
constexpr int64_t LONGEST_SUM = 384;  // numbers added up one after the other; rounding adds up, too

// ROWS rows of W by up to WIDTH rows of x. Fetches the rows behind them meanwhile: a row of W is too short a way for
// the processor's own prefetchers to find out that twelve are read at a time.
template <int ROWS, int WIDTH>
static inline void spread_rows(const Piece &p, int64_t row, const float *x, int64_t count) {
    typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
    const float *weight = p.weight + row * p.columns;
    vector whole[ROWS];
    for (int r = 0; r < ROWS; r++) whole[r] = vector{} + (p.bias ? p.bias[row + r] : 0.0f);
    for (int64_t k = 0; k < p.columns;) {
        vector sums[ROWS] = {};
        const int64_t end = k + LONGEST_SUM < p.columns ? k + LONGEST_SUM : p.columns;
        for (; k < end;) {
            const int64_t next = k + LINE < end ? k + LINE : end;
            for (int r = 0; r < ROWS; r++) __builtin_prefetch(weight + (ROWS + r) * p.columns + k);
            for (; k < next; k++) {
                const vector given = *(const vector *)(x + k * WIDTH);
                for (int r = 0; r < ROWS; r++) sums[r] += weight[r * p.columns + k] * given;
            }
        }
        for (int r = 0; r < ROWS; r++) whole[r] += sums[r];
    }
    for (int64_t i = 0; i < count; i++)
        for (int r = 0; r < ROWS; r++) p.sink.at[i * p.sink.stride + row + r] = whole[r][i];
}

template <int WIDTH>
static void spread_all(const Piece &p, int64_t from, int64_t to, const float *x, int64_t count) {
    int64_t row = from;
    for (; row + SPREAD_ROWS <= to; row += SPREAD_ROWS) spread_rows<SPREAD_ROWS, WIDTH>(p, row, x, count);
    for (; row + 4 <= to; row += 4) spread_rows<4, WIDTH>(p, row, x, count);
    for (; row < to; row++) spread_rows<1, WIDTH>(p, row, x, count);
}

constexpr int64_t FEWER_ROWS = 4;            // of x, up to which rows of W are read as vectors and added up across them
constexpr int64_t THIN = 512;                // columns up to which those are best read one at a time
constexpr int SIDE_BY_SIDE = LANES / 4 + 2;  // rows otherwise: with four rows of x, as many sums as fit the registers

static void fewer_rows(const Piece &p, int64_t from, int64_t to, int64_t count) {
    int64_t row = from;
    if (p.columns > THIN)
        for (; row + SIDE_BY_SIDE <= to; row += SIDE_BY_SIDE) rows_of_x<SIDE_BY_SIDE>(p, row, count);
    for (; row < to; row++) rows_of_x<1>(p, row, count);
}

// Rows [from, to) of W by all rows of x. `turned` is the caller's, for as long as x stays what it is.
static void some_rows(const Piece &p, int64_t from, int64_t to, int64_t count, Turned &turned) {
    if (count == 1) return one_row_of_x(p, from, to);
    if (count <= FEWER_ROWS) return fewer_rows(p, from, to, count);
    for (int64_t first = 0; first < count; first += WIDEST) {
        const int64_t some = count - first < WIDEST ? count - first : WIDEST;
        Piece part = p;
        part.source.at += first * p.source.stride, part.sink.at += first * p.sink.stride;
        turned.turn(part.source, some, p.columns);
        const float *x = turned.numbers.data();
        if (turned.width == 8)
            spread_all<8>(part, from, to, x, some);
        else
            spread_all<16>(part, from, to, x, some);
    }
}

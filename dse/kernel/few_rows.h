// Rows of a weight by a few tokens, where nearly all time is reading the weight once.
//
// One token lies as a row, and a row of W is multiplied by it number by number. More of them stand side by side, number
// k of all of them before number k + 1 of any: each number of W is spread over a vector and meets all tokens at once,
// and nothing has to be added up across a vector.
#pragma once
#include <cstdint>

#include "lanes.h"
#include "memory.h"

constexpr int64_t FEW_ROWS = 16;  // most tokens that are few, as in `KernelChains`

// Into how many columns so many tokens are put, the last ones of which are zeros. 1: a row.
static inline int64_t side_of(int64_t tokens) { return tokens == 1 ? 1 : tokens <= 4 ? 4 : tokens <= 8 ? 8 : 16; }

// Numbers of tokens that stand side by side; from some of them to the next so many features.
struct Operand {
    float *at;
    int64_t stride;
};

// One product: `source` times `weight`, into `sink`.
struct Piece {
    const float *weight;  // (rows, columns), row by row
    const float *bias;    // (rows), or null
    int64_t rows, columns;
    Operand source, sink;
};

// Rows [from, to) of the weight by one token: W from one end to the other, a row at a time, which is what the
// processor's own prefetchers are best at. Reading eight rows side by side, or asking for what comes next, takes up to
// half as long again.
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

constexpr int64_t STRETCH = 256;  // columns of a wide weight at a time
constexpr int64_t SUMMED = 64;    // numbers added up one after the other; rounding adds up, too
constexpr int64_t THIN = 768;     // most columns of a thin weight
constexpr int64_t AHEAD = 2048;   // numbers between what is multiplied and what is fetched

template <int SIZE>
struct VectorOf {
    typedef float type __attribute__((vector_size(4 * SIZE), aligned(4), may_alias));
};

// How many rows of W are multiplied at a time by SIDE tokens. A thin weight is read nearly from one end to the other,
// four rows at a time, and fetched in that order. Of a wide one more rows are read side by side, so that the tokens'
// numbers, which do not fit the first cache, are read less often; it is fetched stretch by stretch: of these rows
// what follows, and behind the last stretch what the next rows begin with.
template <int SIDE, bool IS_WIDE>
struct Tile {
    static constexpr int SIZE = SIDE < LANES ? SIDE : LANES, PARTS = SIDE / SIZE;
    static constexpr int ROWS = IS_WIDE ? 12 / PARTS : 4;
    static constexpr int PHASES = IS_WIDE || PARTS > 1 ? 1 : 2;  // sums of a row: enough of them to wait for none
};

// Rows [row, row + ROWS) of W by SIDE tokens.
template <int ROWS, int SIDE, bool IS_WIDE>
static inline void spread_rows(const Piece &p, int64_t row) {
    constexpr int SIZE = Tile<SIDE, IS_WIDE>::SIZE, PARTS = SIDE / SIZE, PHASES = Tile<SIDE, IS_WIDE>::PHASES;
    typedef typename VectorOf<SIZE>::type vector;
    const int64_t columns = p.columns;
    const float *const weight = p.weight + row * columns, *x = p.source.at;
    // One pointer for four rows, hidden from the compiler, which would keep one for each row and run out of registers.
    const float *first = weight, *second = weight + 4 * columns, *third = weight + 8 * columns;
    auto column = [&](vector(&sums)[ROWS][PHASES][PARTS], int ahead) __attribute__((always_inline)) {
        vector given[PARTS];
        for (int part = 0; part < PARTS; part++) given[part] = *(const vector *)(x + ahead * SIDE + part * SIZE);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
            for (int part = 0; part < PARTS; part++)
                sums[r][ahead % PHASES][part] += (r < 4   ? first
                                                  : r < 8 ? second
                                                          : third)[r % 4 * columns + ahead] *
                                                 given[part];
    };
    auto go_on = [&](int by) __attribute__((always_inline)) {
        x += by * SIDE, first += by, second += by, third += by;
        asm("" : "+r"(first), "+r"(second), "+r"(third));
    };
    vector whole[ROWS][PARTS] = {};
    const int64_t stretches = (columns + STRETCH - 1) / STRETCH,
                  length = (columns / stretches + LINE - 1) / LINE * LINE;
    const int64_t apart = IS_WIDE ? columns : LINE, by = IS_WIDE ? LINE : ROWS * LINE;
    const float *next = weight + AHEAD;
    for (int64_t k = 0, end = IS_WIDE ? 0 : columns; k < columns;) {
        if (k == end) {
            end = k + length < columns ? k + length : columns;
            next = end < columns ? weight + end : weight + ROWS * columns;
        }
        vector sums[ROWS][PHASES][PARTS] = {};
        const int64_t stop = k + SUMMED < end ? k + SUMMED : end;
        for (; k + LINE <= stop; k += LINE, next += by) {
            for (int r = 0; r < ROWS; r++) __builtin_prefetch(next + r * apart);
            for (int some = 0; some < LINE; some += 4) {
#pragma GCC unroll 4
                for (int ahead = 0; ahead < 4; ahead++) column(sums, ahead);
                go_on(4);
            }
        }
        for (; k < stop; k++) column(sums, 0), go_on(1);
        for (int r = 0; r < ROWS; r++)
            for (int phase = 0; phase < PHASES; phase++)
                for (int part = 0; part < PARTS; part++) whole[r][part] += sums[r][phase][part];
    }
    for (int r = 0; r < ROWS; r++)
        for (int part = 0; part < PARTS; part++)
            *(vector *)(p.sink.at + (row + r) * SIDE + part * SIZE) =
                p.bias ? whole[r][part] + p.bias[row + r] : whole[r][part];
}

template <int SIDE, bool IS_WIDE>
static void spread_all(const Piece &p, int64_t from, int64_t to) {
    constexpr int ROWS = Tile<SIDE, IS_WIDE>::ROWS;
    int64_t row = from;
    for (; row + ROWS <= to; row += ROWS) spread_rows<ROWS, SIDE, IS_WIDE>(p, row);
    if (row < to && to - from >= ROWS) return spread_rows<ROWS, SIDE, IS_WIDE>(p, to - ROWS);  // some once more
    for (; row < to; row++) spread_rows<1, SIDE, IS_WIDE>(p, row);
}

template <int SIDE>
static void spread(const Piece &p, int64_t from, int64_t to) {
    p.columns > THIN ? spread_all<SIDE, true>(p, from, to) : spread_all<SIDE, false>(p, from, to);
}

// Rows [from, to) of W by tokens that stand `side` by side.
static void some_rows(const Piece &p, int64_t from, int64_t to, int64_t side) {
    switch (side) {
        case 1:
            return one_row_of_x(p, from, to);
        case 4:
            return spread<4>(p, from, to);
        case 8:
            return spread<8>(p, from, to);
        default:
            return spread<16>(p, from, to);
    }
}

// Four rows of four numbers turned round.
static inline void turn(quad (&rows)[4]) {
    const quad low = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5),
               high = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7),
               more_low = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5),
               more_high = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
    rows[0] = __builtin_shufflevector(low, more_low, 0, 1, 4, 5);
    rows[1] = __builtin_shufflevector(low, more_low, 2, 3, 6, 7);
    rows[2] = __builtin_shufflevector(high, more_high, 0, 1, 4, 5);
    rows[3] = __builtin_shufflevector(high, more_high, 2, 3, 6, 7);
}

// `features` numbers of each of `tokens` rows, `stride` apart, put `side` by side.
static void from_rows(const float *rows, int64_t stride, int64_t tokens, int64_t features, int64_t side, float *y) {
    if (side == 1) return (void)std::memcpy(y, rows, sizeof(float) * features);
    for (int64_t token = 0; token < side; token += 4) {
        const float *from = rows + token * stride;
        const int64_t filled = tokens - token;
        int64_t k = 0;
        for (; k + 4 <= features; k += 4) {
            quad four[4] = {};
            for (int i = 0; i < 4 && i < filled; i++) four[i] = *(const quad *)(from + i * stride + k);
            turn(four);
            for (int i = 0; i < 4; i++) *(quad *)(y + (k + i) * side + token) = four[i];
        }
        for (; k < features; k++)
            for (int i = 0; i < 4; i++) y[k * side + token + i] = i < filled ? from[i * stride + k] : 0.0f;
    }
}

// The other way round.
static void to_rows(const float *x, int64_t side, int64_t tokens, int64_t features, float *rows, int64_t stride) {
    if (side == 1) return (void)std::memcpy(rows, x, sizeof(float) * features);
    for (int64_t token = 0; token < tokens; token += 4) {
        float *to = rows + token * stride;
        const int64_t filled = tokens - token;
        int64_t k = 0;
        for (; k + 4 <= features; k += 4) {
            quad four[4];
            for (int i = 0; i < 4; i++) four[i] = *(const quad *)(x + (k + i) * side + token);
            turn(four);
            for (int i = 0; i < 4 && i < filled; i++) *(quad *)(to + i * stride + k) = four[i];
        }
        for (; k < features; k++)
            for (int i = 0; i < 4 && i < filled; i++) to[i * stride + k] = x[k * side + token + i];
    }
}

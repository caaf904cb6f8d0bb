// Attention of one new token of each sequence over a key-value cache, in one parallel region: scores, softmax and the
// mean of the values together, instead of two products and a kernel between them, each with its own start.
//
// Every thread takes a stretch of the cache for all heads, so that keys and values are read once, in one stream, and
// keeps the largest score, the sum and the mean of its own stretch; these are joined at the end, as in flash decoding
// (Dao et al. 2023). Heads that share keys (grouped-query attention) are rows of one product with them.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "products.h"

struct Cache {
    const float *keys, *values, *mask;  // (batch, heads, positions, columns); mask (positions) for each sequence
    int64_t batch, heads, positions, key_columns, value_columns, mask_stride;
};

// Where the threads of one attention work: `rows` queries, scaled, in groups that share a head of the cache.
struct Stretches {
    int64_t count, used;  // how many there are, and how many positions of the cache are looked at
    int64_t rows, group, partial, stride;
    float *partials;  // (stretches, rows, partial): of a row the sum of weight x value, the largest score, the sum of
                      // weights

    Stretches(const Cache &c, int64_t group, int64_t used)
        : count(at::get_num_threads()),
          used(used),
          rows(c.batch * c.heads * group),
          group(group),
          partial(c.value_columns + 2),
          partials(nullptr) {
        const int64_t longest = (used + count - 1) / count;
        stride = (longest + LANES - 1) / LANES * LANES;
    }
    int64_t partials_size() const { return count * rows * partial; }
    int64_t scores_size() const { return group * stride; }  // of each thread
    int64_t from(int64_t stretch) const { return used * stretch / count; }
};

// Ask for what is read somewhat later than `size` numbers of the cache: the processor's own prefetchers begin anew with
// every head, and stand still while the softmax is computed.
static inline void fetch(const float *now, int64_t size) {
    constexpr int64_t LATER = 512;
    for (int64_t i = 0; i < size; i += LINE) __builtin_prefetch(now + LATER + i);
}

// OUT keys by IN queries, `columns` apart; to each score `mask` of its key is added. Sums fill the registers, so that a
// load serves several products.
template <int OUT, int IN>
static inline void tile_of_scores(const float *keys, const float *mask, const float *queries, int64_t columns,
                                  float *scores, int64_t stride) {
    lanes sums[OUT][IN] = {};
    int64_t k = 0;
    for (; k + LANES <= columns; k += LANES) {
        lanes key[OUT];
        for (int o = 0; o < OUT; o++) key[o] = *(const lanes *)(keys + o * columns + k);
        for (int i = 0; i < IN; i++) {
            const lanes query = *(const lanes *)(queries + i * columns + k);
            for (int o = 0; o < OUT; o++) sums[o][i] += key[o] * query;
        }
    }
    constexpr int ALL = OUT * IN;
    for (int first = 0; first < ALL; first += 4) {
        quad parts[4] = {};
        for (int n = first; n < first + 4 && n < ALL; n++) parts[n - first] = folded(sums[n / IN][n % IN]);
        const quad found = totals(parts[0], parts[1], parts[2], parts[3]);
        for (int n = first; n < first + 4 && n < ALL; n++) {
            const int o = n / IN, i = n % IN;
            float sum = found[n - first] + mask[o];
            for (int64_t rest = k; rest < columns; rest++)
                sum += keys[o * columns + rest] * queries[i * columns + rest];
            scores[i * stride + o] = sum;
        }
    }
}

template <int OUT>
static inline void some_scores(const float *keys, const float *mask, const float *queries, int64_t rows,
                               int64_t columns, float *scores, int64_t stride) {
    for (; rows > 0; rows -= 4, queries += 4 * columns, scores += 4 * stride) switch (rows) {
            case 1:
                tile_of_scores<OUT, 1>(keys, mask, queries, columns, scores, stride);
                break;
            case 2:
                tile_of_scores<OUT, 2>(keys, mask, queries, columns, scores, stride);
                break;
            case 3:
                tile_of_scores<OUT, 3>(keys, mask, queries, columns, scores, stride);
                break;
            default:
                tile_of_scores<OUT, 4>(keys, mask, queries, columns, scores, stride);
        }
}

// The scores of `rows` queries with positions [from, to) of a head, `item` among those of all sequences. To their right
// lies what no exponential counts.
static void stretch_scores(const Cache &c, int64_t item, int64_t from, int64_t to, const float *queries, int64_t rows,
                           float *scores, int64_t stride) {
    const float *keys = c.keys + (item * c.positions + from) * c.key_columns,
                *mask = c.mask + item / c.heads * c.mask_stride + from;
    auto some = [&]<int OUT>(int64_t at) {
        some_scores<OUT>(keys + at * c.key_columns, mask + at, queries, rows, c.key_columns, scores + at, stride);
    };
    int64_t at = 0;  // four short rows side by side: adding up lanes takes as long as the products do
    for (; at + 4 <= to - from; at += 4) {
        fetch(keys + at * c.key_columns, 4 * c.key_columns);
        some.template operator()<4>(at);
    }
    for (; at < to - from; at++) some.template operator()<1>(at);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = to - from; i < stride; i++) scores[row * stride + i] = -std::numeric_limits<float>::infinity();
}

// Scores to weights e^(score - largest), in place. Returns their sum; `largest` is the largest score.
static float to_weights(float *scores, int64_t stride, float &largest) {
    largest = -std::numeric_limits<float>::infinity();
    lanes above = lanes{} + largest;
    for (int64_t i = 0; i < stride; i += LANES) {
        const lanes here = *(const lanes *)(scores + i);
        above = here > above ? here : above;
    }
    for (int64_t lane = 0; lane < LANES; lane++) largest = std::max(largest, above[lane]);
    if (largest == -std::numeric_limits<float>::infinity()) {  // nothing in this stretch may be attended to
        for (int64_t i = 0; i < stride; i++)
            if (std::isnan(scores[i])) return scores[i];
        std::memset(scores, 0, sizeof(float) * stride);
        return 0.0f;
    }
    lanes sums = {};
    for (int64_t i = 0; i < stride; i += LANES) {
        lanes &weights = *(lanes *)(scores + i);
        weights = exponential(weights - largest);
        sums += weights;
    }
    const quad parts = folded(sums);
    return parts[0] + parts[1] + parts[2] + parts[3];
}

// Some columns of `mix`, in registers for several rows at once, so that values are read once for all of them.
template <int ROWS, int PARTS>
static int64_t mix_columns(const float *weights, int64_t stride, int64_t count, const float *values, int64_t columns,
                           float *mixed, int64_t mixed_stride, int64_t column) {
    for (; column + PARTS * LANES <= columns; column += PARTS * LANES) {
        lanes sums[ROWS][PARTS] = {};
        for (int64_t i = 0; i < count; i++) {
            fetch(values + i * columns + column, PARTS * LANES);
            for (int part = 0; part < PARTS; part++) {
                const lanes value = *(const lanes *)(values + i * columns + column + part * LANES);
                for (int row = 0; row < ROWS; row++) sums[row][part] += weights[row * stride + i] * value;
            }
        }
        for (int row = 0; row < ROWS; row++)
            std::memcpy(mixed + row * mixed_stride + column, sums[row], sizeof sums[row]);
    }
    return column;
}

template <int ROWS>
static void mix_rows(const float *weights, int64_t stride, int64_t count, const float *values, int64_t columns,
                     float *mixed, int64_t mixed_stride) {
    constexpr int PARTS = LANES == 16 ? 4 : 2;
    int64_t column = mix_columns<ROWS, PARTS>(weights, stride, count, values, columns, mixed, mixed_stride, 0);
    column = mix_columns<ROWS, 1>(weights, stride, count, values, columns, mixed, mixed_stride, column);
    for (int row = 0; row < ROWS; row++)
        for (int64_t rest = column; rest < columns; rest++) {
            float sum = 0.0f;
            for (int64_t i = 0; i < count; i++) sum += weights[row * stride + i] * values[i * columns + rest];
            mixed[row * mixed_stride + rest] = sum;
        }
}

// Of each of `rows` rows of weights: mixed = sum over `count` positions of weight x value.
static void mix(const float *weights, int64_t stride, int64_t rows, int64_t count, const float *values, int64_t columns,
                float *mixed, int64_t mixed_stride) {
    for (; rows > 0; rows -= 4, weights += 4 * stride, mixed += 4 * mixed_stride) switch (rows) {
            case 1:
                mix_rows<1>(weights, stride, count, values, columns, mixed, mixed_stride);
                break;
            case 2:
                mix_rows<2>(weights, stride, count, values, columns, mixed, mixed_stride);
                break;
            case 3:
                mix_rows<3>(weights, stride, count, values, columns, mixed, mixed_stride);
                break;
            default:
                mix_rows<4>(weights, stride, count, values, columns, mixed, mixed_stride);
        }
}

// The mean over all stretches from what each found: `stretches` partial results, `step` floats from one to the next.
static void join(const float *first, int64_t stretches, int64_t step, int64_t width, float *mean) {
    float largest = -std::numeric_limits<float>::infinity(), sum = 0.0f;
    for (int64_t s = 0; s < stretches; s++) largest = std::max(largest, first[s * step + width]);
    std::memset(mean, 0, sizeof(float) * width);
    for (const float *part = first; part < first + stretches * step; part += step) {
        if (part[width + 1] == 0.0f) continue;
        const float share = std::exp(part[width] - largest);
        sum += share * part[width + 1];
        for (int64_t i = 0; i < width; i++) mean[i] += share * part[i];
    }
    for (int64_t i = 0; i < width; i++) mean[i] /= sum;
}

// One stretch of the cache for all queries, (rows, columns) as their heads lie in the cache.
static void one_stretch(const Cache &c, const Stretches &s, int64_t stretch, float *queries, float *scores) {
    const int64_t from = s.from(stretch), to = s.from(stretch + 1), width = c.value_columns;
    for (int64_t item = 0; item < c.batch * c.heads; item++) {
        float *first = queries + item * s.group * c.key_columns,
              *mine = s.partials + (stretch * s.rows + item * s.group) * s.partial;
        stretch_scores(c, item, from, to, first, s.group, scores, s.stride);
        for (int64_t row = 0; row < s.group; row++) {
            float *found = mine + row * s.partial + width;
            found[1] = to_weights(scores + row * s.stride, s.stride, found[0]);
        }
        mix(scores, s.stride, s.group, to - from, c.values + (item * c.positions + from) * width, width, mine,
            s.partial);
    }
}

// The attention's outputs of some rows, (rows, columns of values), once all stretches are done.
static void join_rows(const Stretches &s, int64_t from, int64_t to, float *out) {
    const int64_t width = s.partial - 2;
    for (int64_t row = from; row < to; row++)
        join(s.partials + row * s.partial, s.count, s.rows * s.partial, width, out + row * width);
}

// query (batch, query heads, 1, columns), key and value (batch, heads, positions, columns), mask (batch, 1, 1,
// positions), added to the scores. Returns (batch, 1, query heads, columns of values).
static at::Tensor attend(const at::Tensor &query, const at::Tensor &key, const at::Tensor &value,
                         const at::Tensor &mask, double scaling) {
    for (const at::Tensor *tensor : {&query, &key, &value, &mask})
        TORCH_CHECK(tensor->dim() == 4 && tensor->scalar_type() == at::kFloat,
                    "all must be float32, with four dimensions");
    const int64_t batch = query.size(0), query_heads = query.size(1), heads = key.size(1), positions = key.size(2);
    TORCH_CHECK(key.is_contiguous() && value.is_contiguous() && query.size(2) == 1 && query_heads % heads == 0 &&
                    key.size(0) == batch && value.size(0) == batch && value.size(1) == heads &&
                    value.size(2) == positions && query.size(3) == key.size(3),
                "query, key and value must fit each other");
    TORCH_CHECK(mask.size(0) == batch && mask.size(1) == 1 && mask.size(2) == 1 && mask.size(3) == positions &&
                    (positions == 1 || mask.stride(3) == 1),
                "the mask must have a number for each position");
    const int64_t columns = key.size(3), width = value.size(3), group = query_heads / heads, rows = batch * query_heads;
    const at::Tensor given = query.contiguous(), result = at::empty({batch, 1, query_heads, width}, query.options());
    const Cache cache = {key.const_data_ptr<float>(),
                         value.const_data_ptr<float>(),
                         mask.const_data_ptr<float>(),
                         batch,
                         heads,
                         positions,
                         columns,
                         width,
                         mask.stride(0)};
    float *out = result.mutable_data_ptr<float>();

    // As many stretches as threads are asked for; where fewer come, some take several.
    Stretches work(cache, group, positions);
    const Memory whole(Room::of({rows * columns, work.partials_size(), work.count * work.scores_size()}));
    Room rest = {whole.at};
    float *queries = rest.take(rows * columns);
    work.partials = rest.take(work.partials_size());
    float *scratch = rest.take(work.count * work.scores_size());
    const float *unscaled = given.const_data_ptr<float>();
    for (int64_t i = 0; i < rows * columns; i++) queries[i] = unscaled[i] * (float)scaling;
#pragma omp parallel num_threads(work.count)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (int64_t stretch = thread; stretch < work.count; stretch += threads)
            one_stretch(cache, work, stretch, queries, scratch + stretch * work.scores_size());
#pragma omp barrier
        join_rows(work, rows * thread / threads, rows * (thread + 1) / threads, out);
    }
    return result;
}

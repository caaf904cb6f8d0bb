// Decoder layers for whole prompts, with every product by panels (`panels.h`): from the embedding to the last layer
// tokens stand side by side, so that norms, rotations and the softmax, too, work on vectors of tokens, and nothing is
// turned round but what goes to the cache.
#pragma once
#include "layer.h"
#include "panels.h"

constexpr int64_t POSITIONS_AT_ONCE = 256;  // of the cache, whose scores a thread holds: 64 KB for 64 tokens

static inline lanes larger(lanes a, lanes b) { return a > b ? a : b; }

// `rotate` of `layer.h` for one head of a panel's tokens; cos and sin are panels of a head's numbers.
static void rotate_panel(float *x, const float *cos, const float *sin, int64_t size, float factor) {
    const int64_t half = size / 2 * PANEL;
    for (int64_t i = 0; i < half; i++) {
        const float low = x[i], high = x[i + half];
        x[i] = factor * (low * cos[i] - high * sin[i]);
        x[i + half] = factor * (high * cos[i + half] + low * sin[i + half]);
    }
}

// Softmax attention of a panel's tokens, one head: `query` (size, PANEL), scaled, over keys and values (positions,
// size), of which a token sees its own and those before it. The softmax goes over the cache stretch by stretch and
// keeps the largest score and the sum so far (Milakov and Gimelshein 2018), as flash attention does (Dao et al. 2022).
static void attend_panel(const float *query, const float *keys, const float *values, int64_t size, int64_t first,
                         int64_t filled, float *scores, float *out) {
    const int64_t seen = first + filled, parts = (filled + LANES - 1) / LANES;
    lanes largest[TILE_PARTS], sums[TILE_PARTS] = {};
    for (lanes &one : largest) one = lanes{} - std::numeric_limits<float>::infinity();
    std::fill_n(out, size * PANEL, 0.0f);
    for (int64_t from = 0; from < seen; from += POSITIONS_AT_ONCE) {
        const int64_t to = std::min(from + POSITIONS_AT_ONCE, seen), all = std::clamp(first, from, to);
        // Up to `all` every token sees every position; behind it vector by vector fewer do.
        auto products = [&](auto work) {
            if (from < all) work(from, all, 0);
            for (int64_t at = all; at < to;) {
                const int64_t part = (at - first) / LANES, next = std::min(first + (part + 1) * LANES, to);
                work(at, next, part);
                at = next;
            }
        };
        products([&](int64_t begin, int64_t end, int64_t part) {
            rows_of_sums({keys + begin * size, size, 1}, query + part * LANES, size,
                         scores + (begin - from) * PANEL + part * LANES, end - begin, parts - part, {});
        });
        for (int64_t at = all; at < to; at++)
            std::fill_n(scores + (at - from) * PANEL, at - first, -std::numeric_limits<float>::infinity());
        for (int64_t part = 0; part < parts; part++) {
            float *own = scores + part * LANES;
            lanes above = largest[part], sum = {};
            for (int64_t i = 0; i < to - from; i++) above = larger(*(const lanes *)(own + i * PANEL), above);
            for (int64_t i = 0; i < to - from; i++) {
                lanes &weight = *(lanes *)(own + i * PANEL);
                weight = exponential(weight - above);
                sum += weight;
            }
            const lanes kept = exponential(largest[part] - above);
            if (from > 0)
                for (int64_t k = 0; k < size; k++) *(lanes *)(out + k * PANEL + part * LANES) *= kept;
            sums[part] = sums[part] * kept + sum;
            largest[part] = above;
        }
        products([&](int64_t begin, int64_t end, int64_t part) {
            rows_of_sums({values + begin * size, 1, size}, scores + (begin - from) * PANEL + part * LANES, end - begin,
                         out + part * LANES, size, parts - part, {true, nullptr});
        });
    }
    for (int64_t k = 0; k < size; k++)
        for (int64_t part = 0; part < parts; part++) *(lanes *)(out + k * PANEL + part * LANES) /= sums[part];
}

// What the layers of one prompt share: activations by panel, and the angles of positions, laid out like a head.
struct PromptRoom {
    Panels panels;
    int64_t width, angle_stride;  // from one sequence's angles to the next
    float *hidden, *normed, *given, *between, *mixed, *cos, *sin;
};

static void normalise_panels(const PromptRoom &room, const Norm &norm) {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < room.panels.count() * TILE_PARTS; item++) {
        const int64_t at = item / TILE_PARTS * room.width * PANEL + item % TILE_PARTS * LANES;
        normalise_tokens<lanes>(room.hidden + at, PANEL, room.width, norm, room.normed + at);
    }
}

// Queries and keys of a panel rotated, keys and values put into the cache: item by item a head of one panel.
static void rotate_and_store(const AttentionBlock &a, const Step &step, const PromptRoom &room, int64_t panel,
                             int64_t head) {
    const Panels &panels = room.panels;
    const int64_t size = a.head_size, sequence = panel / panels.of_sequence(), first = panels.first(panel);
    const int64_t angle = sequence * room.angle_stride + first * size;
    float *given = room.given + panel * a.inputs.out_features * PANEL;
    const bool is_query = head < a.query_heads;
    const int64_t of_cache = head - a.query_heads;
    float *rows = given + (is_query ? a.query_at + head * size : a.key_at + of_cache * size) * PANEL;
    const Norm *norm = is_query ? a.query_norm.get() : a.key_norm.get();
    if (norm)
        for (int64_t part = 0; part < TILE_PARTS; part++)
            normalise_tokens<lanes>(rows + part * LANES, PANEL, size, *norm, rows + part * LANES);
    rotate_panel(rows, room.cos + angle, room.sin + angle, size, is_query ? a.scaling : 1.0f);
    if (is_query) return;
    const int64_t at = ((sequence * a.heads + of_cache) * step.cache.positions + first) * size;
    to_rows(rows, PANEL, panels.filled(panel), size, step.keys + at, size);
    to_rows(given + (a.value_at + of_cache * size) * PANEL, PANEL, panels.filled(panel), size, step.values + at, size);
}

static void attention_of_panels(const AttentionBlock &a, const Step &step, const PromptRoom &room, float *scores) {
    const Panels &panels = room.panels;
    const int64_t stride = a.inputs.out_features, size = a.head_size, width = a.query_heads * size;
    normalise_panels(room, a.norm);
    share_panels(a.inputs, {{room.normed, room.width}, {room.between, a.inputs.scratch}, {room.given, stride}}, panels,
                 false);
    const int64_t heads = a.query_heads + a.heads;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < panels.count() * heads; item++)
        rotate_and_store(a, step, room, item / heads, item % heads);
    // The last panels of a sequence look at most positions: they go first, so that no thread is left with a long one.
    const int64_t items = panels.sequences * a.query_heads;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < panels.of_sequence() * items; item++) {
        const int64_t sequence = item % items / a.query_heads, head = item % a.query_heads;
        const int64_t panel = sequence * panels.of_sequence() + panels.of_sequence() - 1 - item / items;
        const int64_t of_cache = (sequence * a.heads + head / (a.query_heads / a.heads)) * step.cache.positions * size;
        attend_panel(room.given + (panel * stride + a.query_at + head * size) * PANEL, step.keys + of_cache,
                     step.values + of_cache, size, panels.first(panel), panels.filled(panel), scores,
                     room.mixed + (panel * width + head * size) * PANEL);
    }
    share_panels(a.output, {{room.mixed, width}, {room.between, a.output.scratch}, {room.hidden, room.width}}, panels,
                 true);
}

static void mlp_of_panels(const MlpBlock &m, const PromptRoom &room) {
    const int64_t stride = m.inputs.out_features;
    normalise_panels(room, m.norm);
    share_panels(m.inputs, {{room.normed, room.width}, {room.between, m.inputs.scratch}, {room.given, stride}},
                 room.panels, false);
    // In place of the gate; some rows at a time.
    constexpr int64_t ROWS = 32;
    const int64_t blocks = (m.width + ROWS - 1) / ROWS;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < room.panels.count() * blocks; item++) {
        const int64_t row = item % blocks * ROWS, count = std::min(ROWS, m.width - row);
        float *gate = room.given + (item / blocks * stride + m.gate_at + row) * PANEL;
        activate(gate, room.given + (item / blocks * stride + m.up_at + row) * PANEL, count * PANEL, gate);
    }
    share_panels(
        m.output,
        {{room.given + m.gate_at * PANEL, stride}, {room.between, m.output.scratch}, {room.hidden, room.width}},
        room.panels, true);
}

// `prefill_layers` by panels. `layers` and `steps` are what it was asked for, checked: of each layer with attention
// where its cache lies. hidden and y are (sequences, tokens, width).
static void layers_of_panels(const std::vector<std::shared_ptr<const Layer>> &layers, const std::vector<Step> &steps,
                             const Panels &panels, int64_t width, const float *hidden, float *y) {
    int64_t given = 0, between = 0, mixed = 0, head = 0;
    for (const auto &layer : layers) {
        if (const AttentionBlock *a = layer->attention.get()) {
            given = std::max(given, a->inputs.out_features);
            between = std::max({between, a->inputs.scratch, a->output.scratch});
            mixed = std::max(mixed, a->query_heads * a->head_size), head = a->head_size;
        }
        if (const MlpBlock *m = layer->mlp.get()) {
            given = std::max(given, m->inputs.out_features);
            between = std::max({between, m->inputs.scratch, m->output.scratch});
        }
    }
    const int64_t size = panels.count() * PANEL, angles = head * panels.of_sequence() * PANEL;
    const int64_t stride = steps.empty() || steps[0].angle_stride == 0 ? 0 : angles,
                  kinds = stride ? panels.sequences : 1;
    const Memory whole(Room::of(
        {size * width, size * width, size * given, size * between, size * mixed, kinds * angles, kinds * angles}));
    Room rest = {whole.at};
    PromptRoom room = {panels, width, stride};
    for (auto [part, features] : {std::pair{&room.hidden, width},
                                  {&room.normed, width},
                                  {&room.given, given},
                                  {&room.between, between},
                                  {&room.mixed, mixed}})
        *part = rest.take(size * features);
    room.cos = rest.take(kinds * angles), room.sin = rest.take(kinds * angles);
#pragma omp parallel num_threads(at::get_num_threads())
    {
        const Memory scores(POSITIONS_AT_ONCE * PANEL);
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels.count(); panel++) {
            const int64_t filled = panels.filled(panel), sequence = panel / panels.of_sequence();
            from_rows(hidden + panels.row(panel) * width, width, filled, width, PANEL,
                      room.hidden + panel * width * PANEL);
            if (steps.empty() || sequence >= kinds) continue;
            const int64_t from = sequence * steps[0].angle_stride + panels.first(panel) * head,
                          to = sequence * stride + panels.first(panel) * head;
            from_rows(steps[0].cos + from, head, filled, head, PANEL, room.cos + to);
            from_rows(steps[0].sin + from, head, filled, head, PANEL, room.sin + to);
        }
        size_t slot = 0;
        for (const auto &layer : layers) {
            if (layer->attention) attention_of_panels(*layer->attention, steps[slot++], room, scores.at);
            if (layer->mlp) mlp_of_panels(*layer->mlp, room);
        }
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels.count(); panel++)
            to_rows(room.hidden + panel * width * PANEL, PANEL, panels.filled(panel), width,
                    y + panels.row(panel) * width, width);
    }
}

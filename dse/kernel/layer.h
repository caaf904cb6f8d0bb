// Decoder layers for one new token of each sequence, all of them as one parallel region: norm, query-key-value,
// rotation, cache, attention, output, norm, gate and up, activation, down, and both residual sums.
//
// A step of a small model is some thirty layers of some twenty kernels; what each costs to be called, and to wait for
// its last thread, adds up to a fifth of the time and does not shrink with the weights. Here threads meet once a stage
// of products and once for attention. What lies between is so little work (a norm of a few hundred numbers) that every
// thread does all of it for itself, in memory of its own, instead of waiting for others.
#pragma once
#include <mutex>
#include <unordered_map>

#include "attention.h"

struct Norm {
    at::Tensor weight;
    float epsilon;
};

// Softmax attention over a cache, with rotary positions; begins with a norm.
struct AttentionBlock {
    Norm norm;
    Group inputs, output;                // query, key and value; what maps the heads back
    int64_t query_at, key_at, value_at;  // in a row of the results of `inputs`
    int64_t query_heads, heads, head_size;
    float scaling;
    std::unique_ptr<Norm> query_norm, key_norm;  // of each head, or null
};

// down(silu(gate) * up); begins with a norm.
struct MlpBlock {
    Norm norm;
    Group inputs, output;
    int64_t gate_at, up_at, width;
};

struct Layer {
    std::unique_ptr<AttentionBlock> attention;  // null where it was removed
    std::unique_ptr<MlpBlock> mlp;
    int64_t width;
};

// y = weight * x / sqrt(mean(x^2) + epsilon). `y` may be `x`.
static void normalise(const float *x, int64_t width, const Norm &norm, float *y) {
    const float *weight = norm.weight.const_data_ptr<float>();
    lanes squares = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) squares += *(const lanes *)(x + i) * *(const lanes *)(x + i);
    const quad parts = folded(squares);
    float sum = parts[0] + parts[1] + parts[2] + parts[3];
    for (; i < width; i++) sum += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(sum / (float)width + norm.epsilon);
    for (i = 0; i < width; i++) y[i] = weight[i] * (x[i] * factor);
}

// The same for as many tokens as a vector holds, `step` numbers from one feature of theirs to the next.
template <typename vector>
static void normalise_tokens(const float *x, int64_t step, int64_t width, const Norm &norm, float *y) {
    const float *weight = norm.weight.const_data_ptr<float>();
    vector squares = {};
    for (int64_t k = 0; k < width;) {  // some at a time: rounding adds up less
        vector some = {};
        for (const int64_t next = std::min(k + 32, width); k < next; k++)
            some += *(const vector *)(x + k * step) * *(const vector *)(x + k * step);
        squares += some;
    }
    vector factor = squares / (float)width + norm.epsilon;
    for (size_t i = 0; i < sizeof factor / sizeof(float); i++) factor[i] = 1.0f / std::sqrt(factor[i]);
    for (int64_t k = 0; k < width; k++)
        *(vector *)(y + k * step) = weight[k] * (*(const vector *)(x + k * step) * factor);
}

// The same for the tokens of a step, `side` by side.
static void normalise_few(const float *x, int64_t side, int64_t width, const Norm &norm, float *y) {
    if (side == 1) return normalise(x, width, norm, y);
    if (side == 4) return normalise_tokens<quad>(x, side, width, norm, y);
    constexpr int64_t SIZE = LANES < 8 ? LANES : 8;
    typedef VectorOf<SIZE>::type vector;
    for (int64_t part = 0; part < side; part += SIZE) normalise_tokens<vector>(x + part, side, width, norm, y + part);
}

// Rotary positions (Su et al. 2021), in place, the halves of a head turned against each other as in GPT-NeoX.
static void rotate(float *x, const float *cos, const float *sin, int64_t size, float factor) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        const float low = x[i], high = x[i + half];
        x[i] = factor * (low * cos[i] - high * sin[i]);
        x[i + half] = factor * (high * cos[i + half] + low * sin[i + half]);
    }
}

// y = silu(gate) * up, silu(x) = x / (1 + e^-x); by e^-|x|, which cannot overflow.
static void activate(const float *gate, const float *up, int64_t width, float *y) {
    auto of = [](lanes g, lanes u) {
        const lanes e = exponential(g < 0.0f ? g : -g), above = 1.0f / (1.0f + e);
        return g * (g < 0.0f ? e * above : above) * u;
    };
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) *(lanes *)(y + i) = of(*(const lanes *)(gate + i), *(const lanes *)(up + i));
    if (i == width) return;
    lanes g = {}, u = {};
    std::memcpy(&g, gate + i, sizeof(float) * (width - i));
    std::memcpy(&u, up + i, sizeof(float) * (width - i));
    const lanes found = of(g, u);
    std::memcpy(y + i, &found, sizeof(float) * (width - i));
}

static void add(float *sum, const float *x, int64_t size) {
    for (int64_t i = 0; i < size; i++) sum[i] += x[i];
}

// The cache of one layer, and where the new token goes.
struct Step {
    Cache cache;
    float *keys, *values;  // those of `cache`, to be written
    const float *cos, *sin;
    int64_t angle_stride, position;  // from one sequence's angles to the next; index of the new token
};

// The new token's keys and values, from a row of products for each sequence, to their place in the cache.
static void append(const AttentionBlock &a, const Step &step, const float *given) {
    const int64_t size = a.head_size, stride = a.inputs.out_features;
    for (int64_t item = 0; item < step.cache.batch * a.heads; item++) {
        const int64_t i = item / a.heads, head = item % a.heads;
        const float *row = given + i * stride;
        float *key = step.keys + (item * step.cache.positions + step.position) * size;
        float *value = step.values + (item * step.cache.positions + step.position) * size;
        std::memcpy(key, row + a.key_at + head * size, sizeof(float) * size);
        if (a.key_norm) normalise(key, size, *a.key_norm, key);
        rotate(key, step.cos + i * step.angle_stride, step.sin + i * step.angle_stride, size, 1.0f);
        std::memcpy(value, row + a.value_at + head * size, sizeof(float) * size);
    }
}

// Memory of a block that all threads share, and of each thread: how much, and which part is what.
struct Rooms {
    Room shared, own;
};

// One thread's part of an attention block: `hidden` (width, side), its own, grows by the block's output.
static void attention_share(const AttentionBlock &a, const Step &step, Stretches stretches, Rooms rooms, float *hidden,
                            int64_t width, int64_t thread, int64_t threads) {
    const Cache &c = step.cache;
    const int64_t count = c.batch, size = a.head_size, stride = a.inputs.out_features, heads = a.query_heads * size;
    const int64_t side = side_of(count);
    float *together = rooms.shared.take(side * stride);
    float *between = rooms.shared.take(side * std::max(a.inputs.scratch, a.output.scratch));
    float *delta = rooms.shared.take(side * width);
    stretches.partials = rooms.shared.take(stretches.partials_size());
    float *normed = rooms.own.take(side * width), *given = rooms.own.take(count * stride);
    float *queries = rooms.own.take(count * heads), *mixed = rooms.own.take(count * heads);
    float *mixed_together = rooms.own.take(side * heads), *scores = rooms.own.take(stretches.scores_size());

    normalise_few(hidden, side, width, a.norm, normed);
    share(a.inputs, {{normed, width}, {between, a.inputs.scratch}, {together, stride}}, side, thread, threads);
#pragma omp barrier
    // Attention is each sequence's own.
    to_rows(together, side, count, stride, given, stride);
    for (int64_t i = 0; i < count; i++) {
        const float *cos = step.cos + i * step.angle_stride, *sin = step.sin + i * step.angle_stride;
        for (int64_t head = 0; head < a.query_heads; head++) {
            float *query = queries + (i * a.query_heads + head) * size;
            std::memcpy(query, given + i * stride + a.query_at + head * size, sizeof(float) * size);
            if (a.query_norm) normalise(query, size, *a.query_norm, query);
            rotate(query, cos, sin, size, a.scaling);
        }
    }
    for (int64_t stretch = thread; stretch < stretches.count; stretch += threads) {
        // Whoever looks at the new position is the one who writes it.
        if (stretches.from(stretch) <= step.position && step.position < stretches.from(stretch + 1))
            append(a, step, given);
        one_stretch(c, stretches, stretch, queries, scores);
    }
#pragma omp barrier
    join_rows(stretches, 0, stretches.rows, mixed);
    from_rows(mixed, heads, count, heads, side, mixed_together);
    share(a.output, {{mixed_together, heads}, {between, a.output.scratch}, {delta, width}}, side, thread, threads);
#pragma omp barrier
    add(hidden, delta, side * width);
}

// The numbers that all threads share and those of each, as `attention_share` takes them.
static std::pair<int64_t, int64_t> attention_room(const AttentionBlock &a, const Stretches &s, int64_t count,
                                                  int64_t width) {
    const int64_t heads = a.query_heads * a.head_size, stride = a.inputs.out_features, side = side_of(count);
    return {
        Room::of({side * stride, side * std::max(a.inputs.scratch, a.output.scratch), side * width, s.partials_size()}),
        Room::of({side * width, count * stride, count * heads, count * heads, side * heads, s.scores_size()})};
}

// One thread's part of an MLP block: like `attention_share`.
static void mlp_share(const MlpBlock &m, int64_t side, Rooms rooms, float *hidden, int64_t width, int64_t thread,
                      int64_t threads) {
    const int64_t stride = m.inputs.out_features;
    float *given = rooms.shared.take(side * stride);
    float *between = rooms.shared.take(side * std::max(m.inputs.scratch, m.output.scratch));
    float *delta = rooms.shared.take(side * width);
    float *normed = rooms.own.take(side * width);
    float *active = rooms.own.take(side * m.width);
    normalise_few(hidden, side, width, m.norm, normed);
    share(m.inputs, {{normed, width}, {between, m.inputs.scratch}, {given, stride}}, side, thread, threads);
#pragma omp barrier
    activate(given + side * m.gate_at, given + side * m.up_at, side * m.width, active);
    share(m.output, {{active, m.width}, {between, m.output.scratch}, {delta, width}}, side, thread, threads);
#pragma omp barrier
    add(hidden, delta, side * width);
}

static std::pair<int64_t, int64_t> mlp_room(const MlpBlock &m, int64_t side, int64_t width) {
    const int64_t stride = m.inputs.out_features;
    return {Room::of({side * stride, side * std::max(m.inputs.scratch, m.output.scratch), side * width}),
            Room::of({side * width, side * m.width})};
}

// Layers live here from `new_layer` to `free_layer`; a number is all that a traced program has to carry.
struct Layers {
    std::mutex mutex;
    std::unordered_map<int64_t, std::shared_ptr<const Layer>> known;
    int64_t last = 0;

    int64_t keep(Layer layer) {
        const std::lock_guard<std::mutex> guard(mutex);
        known[++last] = std::make_shared<const Layer>(std::move(layer));
        return last;
    }
    std::shared_ptr<const Layer> get(int64_t number) {
        const std::lock_guard<std::mutex> guard(mutex);
        const auto found = known.find(number);
        TORCH_CHECK(found != known.end(), "layer ", number, " must be known, but was freed or never made");
        return found->second;
    }
    void drop(int64_t number) {
        const std::lock_guard<std::mutex> guard(mutex);
        known.erase(number);
    }
};

static Layers &layers() {
    static Layers *kept = new Layers;  // never destroyed: tensors must not be freed after torch itself
    return *kept;
}

static Norm norm_of(const at::Tensor &weight, double epsilon, int64_t size) {
    TORCH_CHECK(weight.scalar_type() == at::kFloat && weight.is_contiguous() && weight.numel() == size,
                "a norm must have ", size, " weights in float32");
    return {weight, (float)epsilon};
}

// Makes a layer. Tensors and numbers are those of `KernelLayer` in Python: of each block that is there its norm, and
// for the two groups of its products their weights, layout, out_features and scratch.
static int64_t new_layer(at::TensorList attention, at::IntArrayRef attention_sizes,
                         at::ArrayRef<double> attention_numbers, at::TensorList mlp, at::IntArrayRef mlp_sizes,
                         double mlp_epsilon, int64_t width) {
    Layer layer = {nullptr, nullptr, width};
    if (!attention.empty()) {
        TORCH_CHECK((attention.size() == 5 || attention.size() == 7) && attention_sizes.size() == 11 &&
                        attention_numbers.size() == 2,
                    "an attention block has five or seven tensors and thirteen numbers");
        const int64_t *n = attention_sizes.data();
        const int64_t query_heads = n[6], heads = n[7], size = n[8];
        TORCH_CHECK(heads > 0 && query_heads % heads == 0 && size > 0 && size % 2 == 0, "heads must fit each other");
        auto block = std::make_unique<AttentionBlock>();
        block->norm = norm_of(attention[0], attention_numbers[0], width);
        block->inputs = group_of(attention[1], attention[2], width, n[0], n[1]);
        block->output = group_of(attention[3], attention[4], query_heads * size, width, n[2]);
        block->inputs.many = many_rows(n[9]), block->output.many = many_rows(n[10]);
        block->query_at = n[3], block->key_at = n[4], block->value_at = n[5];
        TORCH_CHECK(lies_within(n[3], query_heads * size, n[0]) && lies_within(n[4], heads * size, n[0]) &&
                        lies_within(n[5], heads * size, n[0]),
                    "query, key and value must lie within what is multiplied");
        block->query_heads = query_heads, block->heads = heads, block->head_size = size;
        block->scaling = (float)attention_numbers[1];
        if (attention.size() == 7) {
            block->query_norm = std::make_unique<Norm>(norm_of(attention[5], attention_numbers[0], size));
            block->key_norm = std::make_unique<Norm>(norm_of(attention[6], attention_numbers[0], size));
        }
        layer.attention = std::move(block);
    }
    if (!mlp.empty()) {
        TORCH_CHECK(mlp.size() == 5 && mlp_sizes.size() == 8, "an MLP block has five tensors and nine numbers");
        const int64_t *n = mlp_sizes.data();
        auto block = std::make_unique<MlpBlock>();
        block->norm = norm_of(mlp[0], mlp_epsilon, width);
        block->inputs = group_of(mlp[1], mlp[2], width, n[0], n[1]);
        block->output = group_of(mlp[3], mlp[4], n[5], width, n[2]);
        block->inputs.many = many_rows(n[6]), block->output.many = many_rows(n[7]);
        block->gate_at = n[3], block->up_at = n[4], block->width = n[5];
        TORCH_CHECK(lies_within(n[3], n[5], n[0]) && lies_within(n[4], n[5], n[0]),
                    "gate and up must lie within what is multiplied");
        layer.mlp = std::move(block);
    }
    return layers().keep(std::move(layer));
}

static void free_layer(int64_t number) { layers().drop(number); }

static Step step_of(const AttentionBlock &a, const at::Tensor &keys, const at::Tensor &values, const at::Tensor &length,
                    const at::Tensor &cos, const at::Tensor &sin, int64_t batch, int64_t tokens) {
    const int64_t positions = keys.size(2), size = a.head_size, position = *length.const_data_ptr<int64_t>();
    for (const at::Tensor *cached : {&keys, &values})
        TORCH_CHECK(cached->scalar_type() == at::kFloat && cached->is_contiguous() &&
                        cached->sizes() == at::IntArrayRef({batch, a.heads, positions, size}),
                    "the cache must be float32, (batch, heads, positions, head size)");
    TORCH_CHECK(position >= 0 && position + tokens <= positions, "the cache has ", positions, " positions, but ",
                tokens, " from number ", position, " on were asked for");
    for (const at::Tensor *angles : {&cos, &sin})
        TORCH_CHECK(angles->scalar_type() == at::kFloat && angles->dim() == 3 && angles->size(1) == tokens &&
                        angles->size(2) == size && (angles->size(0) == 1 || angles->size(0) == batch),
                    "angles must be those of a whole head, for each token");
    return {{keys.const_data_ptr<float>(), values.const_data_ptr<float>(), nullptr, batch, a.heads, positions, size,
             size, 0},
            keys.mutable_data_ptr<float>(),
            values.mutable_data_ptr<float>(),
            cos.const_data_ptr<float>(),
            sin.const_data_ptr<float>(),
            cos.size(0) == 1 ? 0 : tokens * size,
            position};
}

// hidden (batch, 1, width); cos and sin (batch or 1, 1, head size); mask (batch or 1, 1, 1, positions), added to the
// scores; of each layer with attention the cache's keys and values (batch, heads, positions, head size), which take the
// new token, and its length, which grows by it. Returns hidden after all `numbers`.
static at::Tensor decoder_layers(const at::Tensor &hidden, const at::Tensor &cos, const at::Tensor &sin,
                                 const at::Tensor &mask, at::TensorList keys, at::TensorList values,
                                 at::TensorList lengths, at::IntArrayRef numbers) {
    TORCH_CHECK(hidden.dim() == 3 && hidden.size(1) == 1 && hidden.scalar_type() == at::kFloat,
                "hidden states must be float32, (batch, 1, width)");
    TORCH_CHECK(mask.dim() == 4 && mask.size(1) == 1 && mask.size(2) == 1 && mask.scalar_type() == at::kFloat &&
                    (mask.size(3) == 1 || mask.stride(3) == 1),
                "the mask must be float32, (batch, 1, 1, positions)");
    const int64_t count = hidden.size(0), width = hidden.size(2), side = side_of(count);
    TORCH_CHECK(count <= FEW_ROWS, "a step is of ", FEW_ROWS, " sequences at most, but got ", count);
    const at::Tensor x = hidden.contiguous(), cosines = cos.contiguous(), sines = sin.contiguous();
    const at::Tensor y = at::empty(x.sizes(), x.options());
    std::vector<std::shared_ptr<const Layer>> held;
    std::vector<Step> steps;
    std::vector<Stretches> stretches;
    const int64_t asked = at::get_num_threads();
    int64_t shared_size = 0, own_size = 0;
    auto room = [&](std::pair<int64_t, int64_t> sizes) {
        shared_size = std::max(shared_size, sizes.first);
        own_size = std::max(own_size, sizes.second);
    };
    for (const int64_t number : numbers) {
        held.push_back(layers().get(number));
        const Layer &layer = *held.back();
        TORCH_CHECK(layer.width == width, "layer ", number, " has width ", layer.width, ", but got ", width);
        if (layer.attention) {
            const size_t slot = steps.size();
            TORCH_CHECK(slot < keys.size() && slot < values.size() && slot < lengths.size(), "a cache is missing");
            steps.push_back(
                step_of(*layer.attention, keys[slot], values[slot], lengths[slot], cosines, sines, count, 1));
            Cache &cache = steps.back().cache;
            TORCH_CHECK(mask.size(3) > steps.back().position && (mask.size(0) == 1 || mask.size(0) == count),
                        "the mask must have a number for each position");
            cache.mask = mask.const_data_ptr<float>();
            cache.mask_stride = mask.size(0) == 1 ? 0 : mask.stride(0);
            stretches.emplace_back(steps.back().cache, layer.attention->query_heads / layer.attention->heads,
                                   steps.back().position + 1);
            room(attention_room(*layer.attention, stretches.back(), count, width));
        }
        if (layer.mlp) room(mlp_room(*layer.mlp, side, width));
    }
    const int64_t residual = Room::of({side * width});
    const Memory whole(2 * shared_size + asked * (residual + own_size));
#pragma omp parallel num_threads(asked)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float *mine = whole.at + 2 * shared_size + thread * (residual + own_size);
        from_rows(x.const_data_ptr<float>(), width, count, width, side, mine);
        // Blocks take the two shared rooms by turns: a thread that lags may still read what the last block left.
        int64_t block = 0;
        auto rooms = [&] { return Rooms{{whole.at + block++ % 2 * shared_size}, {mine + residual}}; };
        size_t slot = 0;
        for (const auto &layer : held) {
            if (layer->attention) {
                attention_share(*layer->attention, steps[slot], stretches[slot], rooms(), mine, width, thread, threads);
                slot++;
            }
            if (layer->mlp) mlp_share(*layer->mlp, side, rooms(), mine, width, thread, threads);
        }
        if (thread == 0) to_rows(mine, side, count, width, y.mutable_data_ptr<float>(), width);
    }
    for (size_t slot = 0; slot < steps.size(); slot++) ++*lengths[slot].mutable_data_ptr<int64_t>();
    return y;
}

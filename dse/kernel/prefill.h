// Decoder layers for a whole prompt: by panels (`panel_layers.h`), or, where a matrix library is clearly faster on the
// machine, with its products, and row by row what lies between them.
//
// Either way norms, rotations, activations and sums are one pass over memory each, attention looks at no position
// behind its own, and nothing has to be compiled anew for every point.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include "panel_layers.h"

// Some columns of a group's results or of its scratch, (rows, columns), as a tensor of their own.
struct Part {
    bool is_result;
    int64_t at, columns;
    at::Tensor numbers;

    bool holds(bool result, int64_t from, int64_t size) const {
        return is_result == result && at <= from && from + size <= at + columns;
    }
};

// A column range of a tensor (rows, ...).
struct Columns {
    const float *at;
    int64_t stride;
    const float *row(int64_t i) const { return at + i * stride; }
};

static at::Tensor multiplied(const at::Tensor &x, const at::Tensor &weight, const std::optional<at::Tensor> &bias,
                             ManyRows many) {
    if (many != ManyRows::onednn) return at::linear(x, weight, bias);
    static const c10::OperatorHandle product =
        c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "");
    std::vector<c10::IValue> stack = {x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), ""};
    product.callBoxed(&stack);
    return stack.at(0).toTensor();
}

static const at::Tensor &part_of(const std::vector<Part> &parts, bool result, int64_t from, int64_t size,
                                 int64_t &offset) {
    for (const Part &part : parts)
        if (part.holds(result, from, size)) {
            offset = from - part.at;
            return part.numbers;
        }
    TORCH_CHECK(false, "columns must be those of one product");
}

static Columns columns_of(const std::vector<Part> &parts, int64_t from, int64_t size) {
    int64_t offset = 0;
    const at::Tensor &found = part_of(parts, true, from, size, offset);
    return {found.const_data_ptr<float>() + offset, found.size(1)};
}

// Whether `second` goes on where `first` ends, in every place, so that both are one product.
static bool goes_on(const LayoutRow &first, const LayoutRow &second) {
    const bool is_result = first.scratch_at < 0;
    return first.columns == second.columns && first.source_at == second.source_at &&
           second.weight_at == first.weight_at + first.rows * first.columns && is_result == (second.scratch_at < 0) &&
           (first.bias_at < 0 ? second.bias_at < 0 : second.bias_at == first.bias_at + first.rows) &&
           (is_result ? second.result_at == first.result_at + first.rows
                      : second.scratch_at == first.scratch_at + first.rows);
}

// All products of a group for many rows of x (rows, columns); neighbours in memory are multiplied at once.
static std::vector<Part> products(const Group &group, const at::Tensor &x) {
    std::vector<Part> parts;
    for (const auto &stage : group.stages)
        for (size_t i = 0; i < stage.size();) {
            LayoutRow whole = stage[i++];
            for (; i < stage.size() && goes_on(whole, stage[i]); i++) whole.rows += stage[i].rows;
            int64_t offset = 0;
            at::Tensor source = x;
            if (whole.source_at >= 0) {
                source = part_of(parts, false, whole.source_at, whole.columns, offset);
                source = source.narrow(1, offset, whole.columns);
            }
            const at::Tensor flat = group.weights.view(-1);
            const at::Tensor weight =
                flat.narrow(0, whole.weight_at, whole.rows * whole.columns).view({whole.rows, whole.columns});
            std::optional<at::Tensor> bias;
            if (whole.bias_at >= 0) bias = flat.narrow(0, whole.bias_at, whole.rows);
            const bool is_result = whole.scratch_at < 0;
            parts.push_back({is_result, is_result ? whole.result_at : whole.scratch_at, whole.rows,
                             multiplied(source, weight, bias, group.many).contiguous()});
        }
    return parts;
}

template <class Work>
static void each_row(int64_t rows, const Work &work) {
    at::parallel_for(0, rows, 8, [&](int64_t from, int64_t to) {
        for (int64_t row = from; row < to; row++) work(row);
    });
}

// hidden (rows, width) grows by an attention block's output; the prompt's keys and values join the cache.
static void attention_of_prompt(const AttentionBlock &a, const Step &step, const at::Tensor &keys,
                                const at::Tensor &values, float *hidden, const at::Tensor &normed, int64_t tokens) {
    const int64_t batch = step.cache.batch, rows = batch * tokens, size = a.head_size, width = normed.size(1);
    float *y = normed.mutable_data_ptr<float>();
    each_row(rows, [&](int64_t row) { normalise(hidden + row * width, width, a.norm, y + row * width); });
    const std::vector<Part> parts = products(a.inputs, normed);
    const Columns given_query = columns_of(parts, a.query_at, a.query_heads * size),
                  given_key = columns_of(parts, a.key_at, a.heads * size),
                  given_value = columns_of(parts, a.value_at, a.heads * size);
    const at::Tensor query = at::empty({batch, a.query_heads, tokens, size}, normed.options());
    float *queries = query.mutable_data_ptr<float>();
    each_row(rows, [&](int64_t row) {
        const int64_t item = row / tokens, token = row % tokens;
        const float *cos = step.cos + item * step.angle_stride + token * size,
                    *sin = step.sin + item * step.angle_stride + token * size;
        for (int64_t head = 0; head < a.query_heads; head++) {
            float *to = queries + ((item * a.query_heads + head) * tokens + token) * size;
            std::memcpy(to, given_query.row(row) + head * size, sizeof(float) * size);
            if (a.query_norm) normalise(to, size, *a.query_norm, to);
            rotate(to, cos, sin, size, 1.0f);
        }
        for (int64_t head = 0; head < a.heads; head++) {
            const int64_t at = ((item * a.heads + head) * step.cache.positions + token) * size;
            std::memcpy(step.keys + at, given_key.row(row) + head * size, sizeof(float) * size);
            if (a.key_norm) normalise(step.keys + at, size, *a.key_norm, step.keys + at);
            rotate(step.keys + at, cos, sin, size, 1.0f);
            std::memcpy(step.values + at, given_value.row(row) + head * size, sizeof(float) * size);
        }
    });
    const at::Tensor mixed =
        at::scaled_dot_product_attention(query, keys.narrow(2, 0, tokens), values.narrow(2, 0, tokens), {}, 0.0,
                                         /*is_causal=*/true, a.scaling, /*enable_gqa=*/true);
    const std::vector<Part> out = products(a.output, mixed.transpose(1, 2).reshape({rows, a.query_heads * size}));
    const Columns delta = columns_of(out, 0, width);
    each_row(rows, [&](int64_t row) { add(hidden + row * width, delta.row(row), width); });
}

static void mlp_of_prompt(const MlpBlock &m, float *hidden, const at::Tensor &normed) {
    const int64_t rows = normed.size(0), width = normed.size(1);
    float *y = normed.mutable_data_ptr<float>();
    each_row(rows, [&](int64_t row) { normalise(hidden + row * width, width, m.norm, y + row * width); });
    const std::vector<Part> parts = products(m.inputs, normed);
    const Columns gate = columns_of(parts, m.gate_at, m.width), up = columns_of(parts, m.up_at, m.width);
    const at::Tensor active = at::empty({rows, m.width}, normed.options());
    float *to = active.mutable_data_ptr<float>();
    each_row(rows, [&](int64_t row) { activate(gate.row(row), up.row(row), m.width, to + row * m.width); });
    const std::vector<Part> out = products(m.output, active);
    const Columns delta = columns_of(out, 0, width);
    each_row(rows, [&](int64_t row) { add(hidden + row * width, delta.row(row), width); });
}

static bool is_by_panels(const Layer &layer) {
    auto is = [](const auto &block) {
        return !block || (block->inputs.many == ManyRows::panels && block->output.many == ManyRows::panels);
    };
    return is(layer.attention) && is(layer.mlp);
}

static void layers_by_libraries(const std::vector<std::shared_ptr<const Layer>> &layers, const std::vector<Step> &steps,
                                at::TensorList keys, at::TensorList values, const at::Tensor &y, int64_t tokens) {
    const int64_t width = y.size(-1);
    const at::Tensor normed = at::empty({y.numel() / width, width}, y.options());
    float *hidden = y.mutable_data_ptr<float>();
    size_t slot = 0;
    for (const auto &layer : layers) {
        if (layer->attention) {
            attention_of_prompt(*layer->attention, steps[slot], keys[slot], values[slot], hidden, normed, tokens);
            slot++;
        }
        if (layer->mlp) mlp_of_prompt(*layer->mlp, hidden, normed);
    }
}

// Like `decoder_layers`, for hidden (batch, tokens, width) with an empty cache, every token attending to itself and to
// those before it; cos and sin are (batch or 1, tokens, head size).
static at::Tensor prefill_layers(const at::Tensor &hidden, const at::Tensor &cos, const at::Tensor &sin,
                                 at::TensorList keys, at::TensorList values, at::TensorList lengths,
                                 at::IntArrayRef numbers) {
    TORCH_CHECK(hidden.dim() == 3 && hidden.scalar_type() == at::kFloat,
                "hidden states must be float32, of three dimensions");
    const int64_t batch = hidden.size(0), tokens = hidden.size(1), width = hidden.size(2);
    const at::Tensor y = hidden.clone(at::MemoryFormat::Contiguous);
    const at::Tensor cosines = cos.contiguous(), sines = sin.contiguous();
    std::vector<std::shared_ptr<const Layer>> held;
    std::vector<Step> steps;
    for (const int64_t number : numbers) {
        held.push_back(layers().get(number));
        const Layer &layer = *held.back();
        TORCH_CHECK(layer.width == width, "layer ", number, " has width ", layer.width, ", but got ", width);
        if (!layer.attention) continue;
        const size_t slot = steps.size();
        TORCH_CHECK(slot < keys.size() && slot < values.size() && slot < lengths.size(), "a cache is missing");
        steps.push_back(
            step_of(*layer.attention, keys[slot], values[slot], lengths[slot], cosines, sines, batch, tokens));
        TORCH_CHECK(steps.back().position == 0, "the cache must be empty");
    }
    if (std::all_of(held.begin(), held.end(), [](const auto &layer) { return is_by_panels(*layer); }))
        layers_of_panels(held, steps, {batch, tokens}, width, y.const_data_ptr<float>(), y.mutable_data_ptr<float>());
    else
        layers_by_libraries(held, steps, keys, values, y, tokens);
    for (size_t slot = 0; slot < steps.size(); slot++) *lengths[slot].mutable_data_ptr<int64_t>() = tokens;
    return y;
}

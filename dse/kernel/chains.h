// The operator for products that follow from one input, of few rows or of many.
#pragma once
#include "panels.h"

// Chains of products that begin with one input x (..., columns): every matrix of `weights`, which is one flat tensor,
// is multiplied as its row of `layout` says. Returns (..., out_features), the results of all chains side by side.
static at::Tensor chains(const at::Tensor &given, const at::Tensor &weights, const at::Tensor &layout,
                         int64_t out_features, int64_t scratch) {
    TORCH_CHECK(given.scalar_type() == at::kFloat, "the input must be float32");
    const at::Tensor x = given.contiguous();
    const int64_t in_features = x.size(-1), count = x.numel() / in_features;
    const Group group = group_of(weights, layout, in_features, out_features, scratch);
    auto sizes = x.sizes().vec();
    sizes.back() = out_features;
    const at::Tensor y = at::empty(sizes, x.options());
    if (count > FEW_ROWS) {
        chains_of_many(group, x.const_data_ptr<float>(), count, y.mutable_data_ptr<float>());
        return y;
    }
    const int64_t side = side_of(count);
    const Memory room(Room::of({in_features * side, scratch * side, out_features * side}));
    Room rest = {room.at};
    const Buffers buffers = {{rest.take(in_features * side), in_features},
                             {rest.take(scratch * side), scratch},
                             {rest.take(out_features * side), out_features}};
#pragma omp parallel num_threads(at::get_num_threads())
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        auto part = [&](int64_t features, int64_t of) { return features * of / threads; };
        const int64_t in = part(in_features, thread), out = part(out_features, thread);
        from_rows(x.const_data_ptr<float>() + in, in_features, count, part(in_features, thread + 1) - in, side,
                  buffers.input.at + in * side);
#pragma omp barrier
        share(group, buffers, side, thread, threads);
#pragma omp barrier
        to_rows(buffers.result.at + out * side, side, count, part(out_features, thread + 1) - out,
                y.mutable_data_ptr<float>() + out, out_features);
    }
    return y;
}

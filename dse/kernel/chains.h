// The operator for products that follow from one input, of few rows or of many.
#pragma once
#include "panels.h"

constexpr int64_t FEW_ROWS = 16;  // most rows that are multiplied one row of W after the other; as in `KernelChains`

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
    const std::unique_ptr<float[]> between(scratch ? new float[count * scratch] : nullptr);
    const Buffers buffers = {{const_cast<float *>(x.const_data_ptr<float>()), in_features},
                             {between.get(), scratch},
                             {y.mutable_data_ptr<float>(), out_features}};
#pragma omp parallel num_threads(at::get_num_threads())
    share(group, buffers, count, omp_get_thread_num(), omp_get_num_threads());
    return y;
}

// The operators of this package for decode steps on a CPU: `dse::chains` and `dse::attend`.
#include <torch/library.h>

#include "attention.h"
#include "products.h"

TORCH_LIBRARY_FRAGMENT(dse, library) {
    library.def("chains(Tensor x, Tensor weights, Tensor layout, int out_features, int scratch) -> Tensor");
    library.impl("chains", torch::dispatch(c10::DispatchKey::CPU, chains));
    library.def("attend(Tensor query, Tensor key, Tensor value, Tensor mask, float scaling) -> Tensor");
    library.impl("attend", torch::dispatch(c10::DispatchKey::CPU, attend));
}

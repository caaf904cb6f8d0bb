// The operators of this package for a CPU: `chains` for products that follow from one input, `attend` and
// `decoder_layers` for decode steps, and `prefill_layers` for prompts.
#include <torch/library.h>

#include "attention.h"
#include "chains.h"
#include "layer.h"
#include "prefill.h"
#include "products.h"

TORCH_LIBRARY_FRAGMENT(dse, library) {
    library.def("chains(Tensor x, Tensor weights, Tensor layout, int out_features, int scratch) -> Tensor");
    library.impl("chains", torch::dispatch(c10::DispatchKey::CPU, chains));
    library.def("attend(Tensor query, Tensor key, Tensor value, Tensor mask, float scaling) -> Tensor");
    library.impl("attend", torch::dispatch(c10::DispatchKey::CPU, attend));
    library.def(
        "new_layer(Tensor[] attention, int[] attention_sizes, float[] attention_numbers, Tensor[] mlp, int[] "
        "mlp_sizes, "
        "float mlp_epsilon, int width) -> int");
    library.impl("new_layer", torch::dispatch(c10::DispatchKey::CPU, new_layer));
    library.def("free_layer(int number) -> ()", free_layer);
    library.def(
        "decoder_layers(Tensor hidden, Tensor cos, Tensor sin, Tensor mask, Tensor(a!)[] keys, Tensor(b!)[] values, "
        "Tensor(c!)[] lengths, int[] numbers) -> Tensor");
    library.impl("decoder_layers", torch::dispatch(c10::DispatchKey::CPU, decoder_layers));
    library.def(
        "prefill_layers(Tensor hidden, Tensor cos, Tensor sin, Tensor(a!)[] keys, Tensor(b!)[] values, "
        "Tensor(c!)[] lengths, int[] numbers) -> Tensor");
    library.impl("prefill_layers", torch::dispatch(c10::DispatchKey::CPU, prefill_layers));
}

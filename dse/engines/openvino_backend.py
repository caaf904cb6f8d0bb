# mypy: ignore-errors
"""OpenVINO: runs `openvino_model.xml`, whose key-value cache is state of the inference request."""

import importlib.metadata
from pathlib import Path

from backend_support import GraphBackend, seconds_of, weight_count

GRAPH = "openvino_model.xml"
MAX_WEIGHTS = 16
"""Different weights of one shape when products are timed; the CPU plugin packs each into a copy of its own."""

PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class Backend(GraphBackend):
    """See `dse.engines.worker`. Options besides device, dtype and threads are OpenVINO's own properties."""

    def load(self, folder, options):
        """Compile the folder's graph. Computes in the dtype asked for; left alone, a CPU may choose bfloat16."""
        import numpy
        import openvino

        self._np, self._ov = numpy, openvino
        self._device = {"cpu": "CPU"}.get(options["device"])
        if self._device is None:
            raise ValueError(f"OpenVINO must run on device cpu, but got {options['device']}")
        precision = PRECISIONS[options["dtype"]]
        self._properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            **({"INFERENCE_NUM_THREADS": options["threads"]} if options["threads"] else {}),
            **{name: value for name, value in options.items() if name not in ("device", "dtype", "threads")},
        }
        self._core = openvino.Core()
        model = self._core.read_model(str(Path(folder) / GRAPH))
        self._request = self._core.compile_model(model, self._device, self._properties).create_infer_request()
        self._inputs = {name for port in model.inputs for name in port.get_names()}
        self._read_vocabulary(folder)

    def time_products(self, shapes, footprint_bytes):
        """Time a graph that multiplies one input by several weights."""
        return [self._seconds(shape, footprint_bytes) for shape in shapes]

    def versions(self):
        """Version of OpenVINO."""
        return {"openvino": importlib.metadata.version("openvino")}

    def _begin(self, batch):
        self._request.reset_state()

    def _logits(self, inputs):
        inputs["beam_idx"] = self._np.arange(len(inputs["input_ids"]), dtype=self._np.int32)
        given = {name: array for name, array in inputs.items() if name in self._inputs}
        return self._request.infer(given, share_inputs=True, share_outputs=True)["logits"]

    def _seconds(self, shape, footprint_bytes):
        from openvino import opset13 as ops

        np, ov = self._np, self._ov
        rows, columns, results = shape
        count = weight_count(columns, results, 4, footprint_bytes, MAX_WEIGHTS)
        generator = np.random.default_rng(0)
        x = ops.parameter([rows, columns], dtype=np.float32)
        # Weights as (results, columns), as a linear layer stores them.
        weights = [ops.constant(generator.uniform(-1, 1, (results, columns)).astype(np.float32)) for _ in range(count)]
        products = [ops.result(ops.matmul(x, weight, False, True)) for weight in weights]
        model = ov.Model(products, [x], "products")
        request = self._core.compile_model(model, self._device, self._properties).create_infer_request()
        request.set_input_tensor(ov.Tensor(generator.uniform(-1, 1, (rows, columns)).astype(np.float32)))
        return seconds_of(request.infer, count)

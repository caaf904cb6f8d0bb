# mypy: ignore-errors
"""ONNX Runtime: runs `model.onnx`, whose key-value cache goes in and out as tensors and stays on the device."""

import importlib.metadata
from pathlib import Path

from backend_support import GraphBackend, Unsupported, seconds_of, weight_count

GRAPH = "model.onnx"
MAX_WEIGHTS = 16
"""Different weights of one shape when products are timed; ONNX Runtime packs each into a copy of its own."""


class Backend(GraphBackend):
    """See `dse.engines.worker`. Options besides device, dtype and threads are entries of the session's config."""

    def load(self, folder, options):
        """Open a session on the folder's graph; its dtype is that of the file."""
        import numpy
        import onnxruntime

        self._np, self._ort = numpy, onnxruntime
        self._options = options
        self._device, self._device_index = _device_of(options["device"])
        self._session = self._opened(str(Path(folder) / GRAPH))
        self._types = {port.name: _NUMPY_TYPES[port.type] for port in self._session.get_inputs()}
        self._caches = [port for port in self._session.get_inputs() if port.name.startswith("past_key_values.")]
        self._outputs = [port.name for port in self._session.get_outputs()]
        self._read_vocabulary(folder)

    def time_products(self, shapes, footprint_bytes):
        """Time a chain-free graph of `MatMul` nodes with different weights."""
        try:
            import onnx  # noqa: F401 - graphs are built with it
        except ImportError:
            raise Unsupported("ONNX Runtime times products of graphs built with onnx: `pip install onnx`") from None
        return [self._seconds(shape, footprint_bytes) for shape in shapes]

    def versions(self):
        """Version of ONNX Runtime."""
        for name in ("onnxruntime", "onnxruntime-gpu"):
            try:
                return {name: importlib.metadata.version(name)}
            except importlib.metadata.PackageNotFoundError:
                continue
        return {"onnxruntime": self._ort.__version__}

    def _opened(self, model):
        """A session on a file or on serialised bytes."""
        settings = self._ort.SessionOptions()
        settings.log_severity_level = 3
        if self._options["threads"]:
            settings.intra_op_num_threads = self._options["threads"]
        for name, value in self._options.items():
            if name not in ("device", "dtype", "threads"):
                settings.add_session_config_entry(name, str(value))
        if self._device == "cuda" and "CUDAExecutionProvider" not in self._ort.get_available_providers():
            raise ValueError("device cuda needs ONNX Runtime with CUDA: `pip install onnxruntime-gpu`")
        cuda = ("CUDAExecutionProvider", {"device_id": self._device_index})
        providers = [cuda, "CPUExecutionProvider"] if self._device == "cuda" else ["CPUExecutionProvider"]
        return self._ort.InferenceSession(model, settings, providers=providers)

    def _value(self, array):
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device, self._device_index)

    def _begin(self, batch):
        self._cached = {}
        for port in self._caches:
            _, heads, _, width = port.shape
            self._cached[port.name] = self._value(self._np.zeros((batch, heads, 0, width), self._types[port.name]))

    def _logits(self, inputs):
        binding = self._session.io_binding()
        for name, array in inputs.items():
            if name in self._types:
                binding.bind_ortvalue_input(name, self._value(array))
        for name, value in self._cached.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            on_cpu = name == "logits" or self._device == "cpu"
            binding.bind_output(name, "cpu" if on_cpu else self._device, 0 if on_cpu else self._device_index)
        self._session.run_with_iobinding(binding)
        logits, *caches = binding.get_outputs()
        self._cached = dict(zip(self._cached, caches, strict=True))
        return logits.numpy()

    def _seconds(self, shape, footprint_bytes):
        """Seconds of one product: a graph that multiplies one input by several weights."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        np = self._np
        rows, columns, results = shape
        element = np.dtype(np.float16 if self._options["dtype"] == "float16" else np.float32)
        kind = TensorProto.FLOAT16 if element == np.float16 else TensorProto.FLOAT
        count = weight_count(columns, results, element.itemsize, footprint_bytes, MAX_WEIGHTS)
        generator = np.random.default_rng(0)
        weights = [
            numpy_helper.from_array(generator.uniform(-1, 1, (columns, results)).astype(element), f"w{i}")
            for i in range(count)
        ]
        nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(count)]
        ports = [helper.make_tensor_value_info(f"y{i}", kind, [rows, results]) for i in range(count)]
        entry = [helper.make_tensor_value_info("x", kind, [rows, columns])]
        graph = helper.make_graph(nodes, "products", entry, ports, weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        session = self._opened(onnx.ModelProto.SerializeToString(model))
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", self._value(generator.uniform(-1, 1, (rows, columns)).astype(element)))
        for port in ports:
            binding.bind_output(port.name, self._device, self._device_index)

        def one_pass():
            session.run_with_iobinding(binding)

        return seconds_of(one_pass, count)


def _device_of(name):
    kind, _, index = name.partition(":")
    return kind, int(index or 0)


_NUMPY_TYPES = {
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
}

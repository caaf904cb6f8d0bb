# mypy: ignore-errors
"""OpenVINO: runs `openvino_model.xml`, whose key-value cache is state of the inference request."""

import importlib.metadata
import json
from pathlib import Path

from backend_support import random_prompts, run_batches, seconds_of

GRAPH = "openvino_model.xml"
MAX_WEIGHTS = 16
"""Different weights of one shape when products are timed; the CPU plugin packs each into a copy of its own."""

PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class Backend:
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
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        self._vocabulary = int(config["vocab_size"])

    def run(self, work):
        """Serve the requests in batches of the concurrency."""
        return run_batches(work, random_prompts(self._vocabulary, work), self._generate)

    def greedy(self, prompts, new_tokens):
        """Greedy continuations, one prompt after the other, so that none is padded."""
        return [self._generate([prompt], new_tokens, lambda: None)[0] for prompt in prompts]

    def log_probabilities(self, prompts):
        """Log-probability of each prompt token but the first."""
        np = self._np
        found = []
        for prompt in prompts:
            self._request.reset_state()
            logits = self._forward(np.array([prompt], dtype=np.int64), 0)[0, :-1].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            found.append(np.take_along_axis(logits, np.array(prompt[1:])[:, None], -1)[:, 0].tolist())
        return found

    def time_products(self, shapes, footprint_bytes):
        """Time a graph that multiplies one input by several weights."""
        return [self._seconds(shape, footprint_bytes) for shape in shapes]

    def versions(self):
        """Version of OpenVINO."""
        return {"openvino": importlib.metadata.version("openvino")}

    def close(self):
        """Nothing to end."""

    def _forward(self, tokens, past):
        """Logits of `tokens`, shape (batch, new), which follow `past` cached ones; valid until the next call."""
        np = self._np
        batch, new = tokens.shape
        inputs = {
            "input_ids": tokens,
            "attention_mask": np.ones((batch, past + new), dtype=np.int64),
            "position_ids": np.ascontiguousarray(np.broadcast_to(np.arange(past, past + new), (batch, new))),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        given = {name: array for name, array in inputs.items() if name in self._inputs}
        return self._request.infer(given, share_inputs=True, share_outputs=True)["logits"]

    def _generate(self, batch, new_tokens, on_token):
        """Greedy tokens of equally long prompts."""
        np = self._np
        self._request.reset_state()
        tokens, past, found = np.array(batch, dtype=np.int64), 0, []
        for _ in range(new_tokens):
            logits = self._forward(tokens, past)
            past += tokens.shape[1]
            tokens = logits[:, -1:].argmax(-1)
            on_token()
            found.append(tokens)
        return np.concatenate(found, 1).tolist()

    def _seconds(self, shape, footprint_bytes):
        from openvino import opset13 as ops

        np, ov = self._np, self._ov
        rows, columns, results = shape
        count = max(1, min(footprint_bytes // (columns * results * 4), MAX_WEIGHTS))
        generator = np.random.default_rng(0)
        x = ops.parameter([rows, columns], dtype=np.float32)
        # Weights as (results, columns), as a linear layer stores them.
        weights = [ops.constant(generator.uniform(-1, 1, (results, columns)).astype(np.float32)) for _ in range(count)]
        products = [ops.result(ops.matmul(x, weight, False, True)) for weight in weights]
        model = ov.Model(products, [x], "products")
        request = self._core.compile_model(model, self._device, self._properties).create_infer_request()
        request.set_input_tensor(ov.Tensor(generator.uniform(-1, 1, (rows, columns)).astype(np.float32)))
        return seconds_of(request.infer, count)

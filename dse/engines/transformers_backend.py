"""Hugging Face transformers in an interpreter of its own: eager, in batches, with its key-value cache."""

import importlib.metadata

from backend_support import BatchBackend, seconds_of, weight_count

MAX_WEIGHTS = 64
"""Different weights of one shape when products are timed."""


class Backend(BatchBackend):
    """See `dse.engines.worker`. Options besides device, dtype and threads are arguments of `from_pretrained`."""

    def load(self, folder, options):
        """Load the folder with `AutoModelForCausalLM`."""
        import torch
        from transformers import AutoModelForCausalLM

        own = {name: value for name, value in options.items() if name not in ("device", "dtype", "threads")}
        if options["threads"]:
            torch.set_num_threads(options["threads"])
        self._torch = torch
        self._device = torch.device(options["device"])
        settings = {"dtype": getattr(torch, options["dtype"]), "trust_remote_code": True, **own}
        self._model = AutoModelForCausalLM.from_pretrained(folder, **settings).to(self._device).eval()
        self._vocabulary = int(self._model.config.get_text_config().vocab_size)

    def log_probabilities(self, prompts):
        """Log-probability of each prompt token but the first."""
        with self._torch.inference_mode():
            return [self._prompt_log_probabilities(prompt) for prompt in prompts]

    def time_products(self, shapes, footprint_bytes):
        """Time products of `torch.nn.functional.linear` with different weights in turn."""
        torch = self._torch
        dtype = self._model.dtype
        found = []
        with torch.inference_mode():
            for rows, columns, results in shapes:
                count = weight_count(columns, results, dtype.itemsize, footprint_bytes, MAX_WEIGHTS)
                weights = torch.empty(count, results, columns, dtype=dtype, device=self._device).uniform_(-1, 1)
                x = torch.randn(rows, columns).to(self._device, dtype)

                def one_pass(weights=weights, x=x):
                    for weight in weights:
                        torch.nn.functional.linear(x, weight)
                    self._wait()

                found.append(seconds_of(one_pass, count))
        return found

    def versions(self):
        """Versions of transformers and torch."""
        return {name: importlib.metadata.version(name) for name in ("transformers", "torch")}

    def _generate(self, batch, new_tokens, on_token):
        """Greedy tokens of equally long prompts; logits of the last position only, as generation needs."""
        torch = self._torch
        tokens = torch.tensor(batch, device=self._device)
        found, cache = [], None
        with torch.inference_mode():
            for _ in range(new_tokens):
                output = self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = output.past_key_values
                tokens = output.logits[:, -1:].argmax(-1)
                self._wait()
                on_token()
                found.append(tokens)
        return torch.cat(found, 1).tolist()

    def _prompt_log_probabilities(self, prompt):
        tokens = self._torch.tensor([prompt], device=self._device)
        logits = self._model(input_ids=tokens).logits[0, :-1].cpu().double()
        return logits.log_softmax(-1).gather(-1, tokens[0, 1:, None].cpu())[:, 0].tolist()

    def _wait(self):
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()

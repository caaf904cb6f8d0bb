"""Load several folders in vLLM, one after another in one process, and generate greedily.

A script for vLLM's own environment; it imports nothing of this project. Usage: `python run_in_vllm.py REQUEST RESULT`.
The request is `{"jobs": [{"folder": ..., "options": {...}}], "prompts": [[ids]], "new_tokens": n}`. The result has one
entry for each job: `{"tokens": ..., "log_probabilities": ...}`, of the new tokens, or `{"error": ...}`.
"""

import gc
import json
import os
import sys
from pathlib import Path


def serve(job, request):
    from vllm import LLM, SamplingParams

    settings = {
        "dtype": "float32",
        "trust_remote_code": True,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "max_num_seqs": len(request["prompts"]),
        "kv_cache_memory_bytes": 2**26,
        "seed": 0,
    }
    engine = LLM(job["folder"], **{**settings, **job["options"]})
    greedy = SamplingParams(
        temperature=0, max_tokens=request["new_tokens"], logprobs=1, ignore_eos=True, detokenize=False
    )
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], greedy, use_tqdm=False)
    found = [output.outputs[0] for output in outputs]
    return {
        "tokens": [list(one.token_ids) for one in found],
        "log_probabilities": [
            [entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs, strict=True)] for one in found
        ],
    }


def main(request_file, result_file):
    request = json.loads(Path(request_file).read_text())
    results = []
    for job in request["jobs"]:
        try:
            results.append(serve(job, request))
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises is the result of this job
            causes = [error]
            while causes[-1].__cause__ is not None:
                causes.append(causes[-1].__cause__)
            results.append({"error": f"{type(causes[-1]).__name__}: {' '.join(str(causes[-1]).split())[:400]}"})
        gc.collect()
        gc.freeze()  # vLLM collects garbage several times a model; what it and torch have imported stays anyway
        Path(result_file).write_text(json.dumps(results))


if __name__ == "__main__":
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    main(*sys.argv[1:])

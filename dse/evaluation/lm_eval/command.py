"""lm-eval's own command line, with the model type `dse` known to it.

`python -m dse.evaluation.lm_eval.command --model dse --model_args pretrained=gpt2 --tasks arc_easy` is
`lm_eval --model hf ...` with shared prompts computed once. lm-eval finds no model types outside its own package, so a
program that imports this one must start it.
"""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

from dse.evaluation.lm_eval.shared_prefix import SharedPrefixLM

__all__ = ["SharedPrefixLM"]

if __name__ == "__main__":
    cli_evaluate()

"""lm-eval's own command line, with the model type `dse` registered.

`python -m dse.evaluation.lm_eval --model dse --model_args pretrained=gpt2 --tasks arc_easy` is `lm_eval --model hf ...`
with shared prefixes computed once. lm-eval does not discover model types outside its own package, so they must be
registered in the process that runs its command line.
"""

from lm_eval.__main__ import cli_evaluate

from dse.evaluation.lm_eval.shared_prefix import SharedPrefixLM

__all__ = ["SharedPrefixLM"]

if __name__ == "__main__":
    cli_evaluate()

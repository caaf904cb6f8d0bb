"""The evaluation tasks and calibration texts that ship with `dse`, and the scripts that generate them.

`tasks/` holds lm-eval task files with their documents. `calibration/` holds similar texts that share no sentence with
the tasks. Both are generated from the lexicon and the facts in `sources/`. The scripts import nothing else of `dse`.
"""

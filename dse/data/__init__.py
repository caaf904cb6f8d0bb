"""Evaluation tasks and calibration text that ship with the package, and the scripts that generate them.

`tasks/` holds lm-eval task files with their documents, `calibration/` text of the same kinds that shares no sentence
with them, `sources/` the lexicon and the facts both are generated from. The lowest layer: it imports nothing of dse.
"""

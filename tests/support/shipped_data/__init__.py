"""Generators of the tasks and calibration text that ship in `dse/data`, and the word lists they use."""

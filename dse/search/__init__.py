"""Search: which point to evaluate next.

A `SearchSpace` defines the points. A `SearchSession` proposes them: warm starts from a sensitivity table or start-up
points first, then by a bandit over the proposers (sampler, refinement, allocation). `dse.search.multi_fidelity` stops
unpromising trials early. Import from the defining modules.
"""

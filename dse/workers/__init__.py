"""Workers of a study: set-up on a resident model, jobs, and the driver's interface to them, in process or on Ray.

The only package that imports ray.
"""

"""The device profile: timed matrix products of a model, and the latencies predicted from them."""

"""What to try next: search spaces, proposers, and multi-fidelity early stopping."""

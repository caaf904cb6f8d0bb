"""EleutherAI lm-eval on the resident model; the only package that imports lm_eval."""

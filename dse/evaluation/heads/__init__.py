"""Encoders with a task head: classification, question answering and embeddings, evaluated on datasets."""

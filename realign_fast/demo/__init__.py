"""A small rendered world and its dual encoder: embeddings with a real modality gap, nothing to download."""

"""A small world of its own, with a real modality gap and nothing to download."""

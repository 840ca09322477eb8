"""How far apart two sets of embeddings are, and what an alignment did to them."""

"""ReVision: a language model that learns from aligned text embeddings to read embeddings of images.

Source: ReVision (arXiv 2602.07026). Importing this tells transformers' Auto classes of the model.
"""

try:
    import transformers as _  # noqa: F401
except ModuleNotFoundError as missing:
    raise ImportError("realign_fast.revision needs transformers: pip install 'realign-fast[train]'") from missing

from .config import ReVisionConfig
from .modeling import Projector, ReVisionForCausalLM, check_packing

__all__ = ["Projector", "ReVisionConfig", "ReVisionForCausalLM", "check_packing"]

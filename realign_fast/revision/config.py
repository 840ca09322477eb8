"""What a ReVision model is made of."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class ReVisionConfig(PreTrainedConfig):
    """Configuration of a `ReVisionForCausalLM`, after ReVision (arXiv 2602.07026) with the projector of LLaVA 1.5.

    Parameters
    ----------
    text_config
        Of the language model: any that `AutoModelForCausalLM` knows, or the same as a dict with its `model_type`.
    embedding_dim
        Dimension of the embeddings of images.
    image_token_id
        The id in `input_ids` that stands for one visual token. It may lie outside of the vocabulary.
    projector
        "mlp" is Linear, GELU, Linear; "linear" one Linear; "identity" hands embeddings through as they are.
    projector_dim
        Hidden width of the MLP, by default that of the token embeddings.
    num_visual_tokens
        How many positions one embedding takes.
    num_projected_tokens
        To how many different tokens it is projected; they are repeated, in their order, to `num_visual_tokens`.

    Raises
    ------
    ValueError
        If a value is none of these, or `num_visual_tokens` no multiple of `num_projected_tokens`.
    """

    model_type = "revision"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers' protocol)
    has_no_defaults_at_init = True

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any],
        embedding_dim: int,
        image_token_id: int,
        projector: str = "mlp",
        projector_dim: int | None = None,
        num_visual_tokens: int = 1,
        num_projected_tokens: int = 1,
        **kwargs: Any,
    ) -> None:
        if projector not in ("mlp", "linear", "identity"):
            raise ValueError(f"projector must be mlp, linear or identity, got {projector!r}")
        if image_token_id < 0 or min(embedding_dim, projector_dim or 1, num_projected_tokens, num_visual_tokens) < 1:
            raise ValueError(
                f"sizes must be at least 1 and image_token_id 0, got embedding_dim {embedding_dim}, projector_dim "
                f"{projector_dim}, num_projected_tokens {num_projected_tokens}, num_visual_tokens {num_visual_tokens} "
                f"and image_token_id {image_token_id}"
            )
        if num_visual_tokens % num_projected_tokens or (projector == "identity" and num_projected_tokens > 1):
            raise ValueError(
                f"num_projected_tokens must divide num_visual_tokens, {num_visual_tokens}, and be 1 for the identity "
                f"projector, got {num_projected_tokens} for {projector}"
            )
        super().__init__(**kwargs)
        self.text_config = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else text_config
        for name in (
            "attn_implementation",
            "experts_implementation",
        ):
            if kwargs.get(name) is not None:
                setattr(self, f"_{name}", kwargs[name])
        self.embedding_dim = embedding_dim
        self.image_token_id = image_token_id
        self.projector = projector
        self.projector_dim = projector_dim
        self.num_visual_tokens = num_visual_tokens
        self.num_projected_tokens = num_projected_tokens

"""What a ReVision model is made of."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class ReVisionConfig(PreTrainedConfig):
    """Configuration of a `ReVisionForCausalLM`; ValueError for what makes no model.

    Parameters
    ----------
    text_config
        Of the language model, any that `AutoModelForCausalLM` knows; or a dict of it, with its `model_type`.
    embedding_dim
        Dimension of the embeddings of images.
    image_token_id
        The id in `input_ids` that stands for one visual token. It may lie outside of the vocabulary.
    projector, projector_dim
        "mlp" is Linear to `projector_dim` (by default the dimension of token embeddings), GELU, Linear, as in LLaVA
        1.5; "linear" is one Linear; "identity" leaves embeddings as they are.
    num_visual_tokens, num_projected_tokens
        How many positions an embedding takes, and to how many different tokens, which are repeated in their order to
        fill these, it is projected.
    **kwargs
        As the configuration of any model of transformers takes them.
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
        super().__init__(**kwargs)
        self.text_config = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else text_config
        for name in ("attn_implementation", "experts_implementation"):  # for `text_config` too, where given
            if kwargs.get(name) is not None:
                setattr(self, f"_{name}", kwargs[name])
        self.embedding_dim, self.image_token_id = embedding_dim, image_token_id
        self.projector, self.projector_dim = projector, projector_dim
        self.num_visual_tokens, self.num_projected_tokens = num_visual_tokens, num_projected_tokens
        if projector not in ("mlp", "linear", "identity"):
            raise ValueError(f"projector must be mlp, linear or identity, got {projector!r}")
        for name in ("embedding_dim", "projector_dim", "num_visual_tokens", "num_projected_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if num_visual_tokens % num_projected_tokens or (projector == "identity" and num_projected_tokens > 1):
            raise ValueError(
                f"num_projected_tokens must divide num_visual_tokens, {num_visual_tokens}, and be 1 for the identity "
                f"projector, got {num_projected_tokens} for {projector}"
            )

"""Any causal language model of transformers, with projected embeddings of images among its token embeddings."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from . import _projectors
from .config import ReVisionConfig


class Projector(nn.Sequential):
    """Turns embeddings of images into visual tokens `(count, hidden_size)`, one image after the other.

    Embeddings are `(n, embedding_dim)`: each is projected once, to `num_projected_tokens` tokens, which are repeated
    until there are `num_visual_tokens`. Or they are `(n, patches, embedding_dim)`, projected patch by patch. Of any
    floating dtype; it computes in that of its weights. ValueError for other shapes, and for the identity between
    different dimensions.

    Parameters
    ----------
    config
        Of the model.
    hidden_size
        Of the language model: dimension of its token embeddings.
    """

    def __init__(self, config: ReVisionConfig, hidden_size: int) -> None:
        dim, width = config.embedding_dim, config.projector_dim or hidden_size
        outputs = config.num_projected_tokens * hidden_size
        layers: list[nn.Module] = []
        if config.projector == "mlp":
            layers = [nn.Linear(dim, width), nn.GELU(), nn.Linear(width, outputs)]
        elif config.projector == "linear":
            layers = [nn.Linear(dim, outputs)]
        elif dim != hidden_size:
            raise ValueError(f"identity projector: embedding_dim must be the hidden size {hidden_size}, got {dim}")
        super().__init__(*layers)
        self.embedding_dim, self.num_projected_tokens = dim, config.num_projected_tokens
        self.repeats = config.num_visual_tokens // config.num_projected_tokens

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Project embeddings."""
        dim, shape = self.embedding_dim, tuple(embeddings.shape)
        if len(shape) not in (2, 3) or shape[-1] != dim:
            raise ValueError(f"embeddings must be (n, {dim}) or (n, patches, {dim}), got shape {shape}")
        dtypes = [parameter.dtype for parameter in self.parameters()]
        tokens: torch.Tensor = embeddings.to(dtypes[0]) if dtypes else embeddings
        for layer in self:
            tokens = layer(tokens)
        tokens = tokens.unflatten(-1, (self.num_projected_tokens, -1))  # type: ignore[no-untyped-call]
        return (tokens.repeat(1, self.repeats, 1) if len(shape) == 2 else tokens).flatten(0, -2)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the parameters by name; what peft puts in the place of a module passes this call on to its copy."""
        return dict(self.named_parameters())


class ReVisionForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model that reads embeddings of images, each projected to one visual token or more.

    Source: ReVision (arXiv 2602.07026). What transformers, its `Trainer` and peft do with other models they do with
    this one. Its `projector` stays float32 when it is loaded in half precision; its `language_model`, by default a new
    one of the config, stays in eval mode where nothing of it trains.
    """

    config_class = ReVisionConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["projector"]  # noqa: RUF012 (transformers' protocol)
    _no_split_modules = ["Projector"]  # noqa: RUF012 (FSDP wraps it by itself then, whatever its dtype)
    language_model: Any

    def __init__(self, config: ReVisionConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        for module in language_model.modules() if language_model else ():
            module._is_hf_initialized = True  # so that `post_init` leaves its weights alone
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.projector = Projector(config, self.get_input_embeddings().embedding_dim)
        # Whether the loss takes the number of labels of all batches of a step, so that accumulation is exact.
        takes = "kwargs" in inspect.signature(self.language_model.forward).parameters
        self.accepts_loss_kwargs = getattr(self.language_model, "accepts_loss_kwargs", takes)
        self.post_init()

    @classmethod
    def from_language_model(
        cls, language_model: PreTrainedModel | str | os.PathLike[str], **kwargs: Any
    ) -> ReVisionForCausalLM:
        """Put a new projector before a language model, or before the one of a name or folder.

        Parameters
        ----------
        language_model
            The model, which becomes part of the new one as it is, or its name.
        **kwargs
            `embedding_dim`, `image_token_id` and what else `ReVisionConfig` takes. For a name, also what
            `AutoModelForCausalLM.from_pretrained` takes.
        """
        names = inspect.signature(ReVisionConfig.__init__).parameters
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        if isinstance(language_model, str | os.PathLike):
            language_model = AutoModelForCausalLM.from_pretrained(language_model, **kwargs)
        elif not isinstance(language_model, PreTrainedModel) or kwargs:
            got = " and ".join([type(language_model).__name__, *kwargs])
            raise TypeError(f"language_model must be a name with options, or a PreTrainedModel without, got {got}")
        model = cls(ReVisionConfig(language_model.config, **options), language_model)
        model.projector.to(language_model.device)
        model.generation_config = language_model.generation_config
        return model.train(language_model.training)

    def embed(self, input_ids: torch.Tensor, embeddings: torch.Tensor | None = None) -> torch.Tensor:
        """Return token embeddings `(batch, length, hidden_size)`, with visual tokens at their placeholders.

        Parameters
        ----------
        input_ids
            `(batch, length)` integers, `image_token_id` wherever a visual token goes.
        embeddings
            As `Projector` takes them, in the order of the placeholders, row by row; None where there are none.

        Raises
        ------
        ValueError
            If there are more or fewer placeholders than visual tokens, or embeddings have another shape.
        """
        places = input_ids == self.config.image_token_id
        words: torch.Tensor = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
        if embeddings is None:  # the projector takes part, with gradients of 0, on every rank of a distributed job
            embeddings = words.new_zeros(0, self.config.embedding_dim)
        tokens, num_places = self.projector(embeddings), int(places.sum())
        if len(tokens) != num_places:
            raise ValueError(
                f"embeddings of shape {tuple(embeddings.shape)} give {len(tokens)} visual tokens, input_ids have "
                f"{num_places} placeholders {self.config.image_token_id}"
            )
        return words.masked_scatter(places[..., None], tokens.to(words))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what the language model returns.

        Parameters
        ----------
        input_ids, embeddings
            As `embed`; or instead of both `inputs_embeds`, `(batch, length, hidden_size)`.
        attention_mask, position_ids, labels
            `(batch, length)`: 0 at padding; positions, which begin anew with each of the samples packed into a row,
            without a mask, see `check_packing`; -100 where there is nothing to predict, so at placeholders.
        **kwargs
            For the language model. `use_cache` is False by default: with a cache, packed samples see each other.
        """
        if (input_ids is None) == (inputs_embeds is None) or (input_ids is None and embeddings is not None):
            raise ValueError("forward takes either input_ids, with or without embeddings, or inputs_embeds alone")
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids, embeddings)
        options = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        given = {name: value for name, value in options.items() if value is not None}  # not every model has them all
        return self.language_model(inputs_embeds=inputs_embeds, **{"use_cache": False, **given, **kwargs})

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        embeddings: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what the language model's `generate` returns: the new tokens `(batch, new)`, without the prompt.

        The arguments are those of `forward`, with padding on the left and a mask for it, and those of transformers'
        `generate`, by default from this model's `generation_config`.
        """
        self.language_model.generation_config = self.generation_config
        inputs_embeds = self.embed(input_ids, embeddings)
        return self.language_model.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def freeze_language_model(self) -> None:
        """Let only the projector train: the language model gets no gradients and stays in eval mode.

        Layers whose activations are checkpointed are marked as training all the same, since transformers checkpoints
        no others. The few architectures where such a layer itself does dropout, as OPT's, need that set to 0.
        """
        self.language_model.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> ReVisionForCausalLM:
        """Choose between training and evaluation; a frozen language model stays in the latter."""
        super().train(mode)
        if mode and not any(parameter.requires_grad for parameter in self.language_model.parameters()):
            for module in self.language_model.modules():
                module.training = getattr(module, "gradient_checkpointing", False)
        return self

    def save_projector(self, path: str | os.PathLike[str], style: _projectors.Style = "realign") -> None:
        """Write the projector alone to a `.safetensors` or torch's `.bin` file, whole or not at all.

        `style` says whose names the tensors get: "llava", as `mm_projector.bin` of LLaVA and Bunny; "transformers", as
        its LLaVA; or our own. With `num_projected_tokens` above 1 the last layer has as many times the outputs: the
        others have no such projector, but the same names do. ValueError for another suffix, or a style without such a
        projector; OSError if it cannot be written.
        """
        _projectors.save(path, self.projector.tensors(), style)

    def load_projector(self, path: str | os.PathLike[str]) -> None:
        """Read the projector from a file of any style of `save_projector`, whatever stands before the names.

        Other tensors in it are left aside, and nothing in it can run code. ValueError if it is damaged, holds more than
        tensors or another projector, which changes nothing; OSError if it cannot be read.
        """
        own = self.projector.tensors()
        for name, tensor in _projectors.load(path, own).items():
            own[name].data.copy_(tensor)

    def get_input_embeddings(self) -> Any:
        """Return the language model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """Return the language model's."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's."""
        self.language_model.set_output_embeddings(new_embeddings)


@torch.no_grad()
def check_packing(model: ReVisionForCausalLM) -> None:
    """Try on a few tokens whether the language model keeps packed samples apart; ValueError if it does not."""
    # In two rows: flash attention looks for packed samples in a single one alone.
    training, vocab_size = model.training, model.config.get_text_config().vocab_size
    words = model.get_input_embeddings()(torch.arange(8, device=model.device).repeat(2, 1) % vocab_size)
    positions = torch.arange(4, device=model.device).repeat(2, 2)
    model.eval()
    apart = model(inputs_embeds=words[:, 4:], position_ids=positions[:, 4:]).logits
    packed = model(inputs_embeds=words, position_ids=positions).logits[:, 4:]
    mask = torch.ones_like(positions)  # with which nothing keeps them apart
    seeing = model(inputs_embeds=words, position_ids=positions, attention_mask=mask).logits[:, 4:]
    model.train(training)
    if (packed - apart).abs().max() > 0.1 * (seeing - apart).abs().max():
        name = type(model.language_model).__name__
        raise ValueError(f"{name} lets packed samples see each other: train without packing")


AutoConfig.register("revision", ReVisionConfig, exist_ok=True)
AutoModelForCausalLM.register(ReVisionConfig, ReVisionForCausalLM, exist_ok=True)

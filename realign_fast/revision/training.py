"""The two stages of training, as arguments, a Trainer of transformers, and a few lines that bring them together.

Source: ReVision (arXiv 2602.07026): modality substitution pretraining on aligned text with the language model frozen,
then visual instruction tuning on real images.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from .._extras import import_extra
from ..alignment import Alignment
from ..data import EmbeddingDataset
from . import _projectors
from .config import ReVisionConfig
from .data import PLAIN_TEMPLATE, Records, ReVisionCollator, ReVisionDataset, add_image_token
from .modeling import ReVisionForCausalLM, check_packing

__all__ = ["FinetuneArguments", "FinetuneTrainerArguments", "PretrainArguments", "ReVisionTrainer", "StageArguments"]
__all__ += ["TrainerArguments", "finetune", "pretrain", "run_stage"]

_PROJECTOR = "projector.safetensors"
_ALIGNMENT = "alignment.safetensors"
_STATE = "trainer_state.json"
_INDEX = "ids.index"


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class StageArguments:
    """What both stages take beside the arguments of transformers; `realign pretrain --help` says what each is."""

    model: str = _option(None, "name or folder of the language model, or of a model that a stage has written")
    data: list[str] | None = _option(None, "records in JSON or JSONL")
    eval_data: list[str] | None = _option(None, "records to evaluate on, by the flags of transformers")
    embeddings: list[str] | None = _option(None, "embeddings of the records, with ids: files, folders, globs or URLs")
    encoder: str | None = _option(None, "instead of embeddings: encodes the captions on their way")
    ids: list[str] | None = _option(None, "parquet or arrow files with the ids of the embeddings, in their order")
    id_column: str = _option("id", "of the ids")
    id_key: str = _option("id", "which key of a record names its embedding")
    alignment: str | None = _option(None, "default: the one beside the model, if any")
    chat_template: str | None = _option(None, "file of a template, or plain; default: the tokenizer's own")
    prompt: str = _option("", "asked before a caption")
    projector: str | None = _option(None, "weights to begin with, also of LLaVA or Bunny")
    projector_type: str = _option("mlp", "mlp, linear or identity")
    projector_dim: int | None = _option(None, "hidden width of the mlp; default: that of the language model")
    num_visual_tokens: int = _option(1, "that stand for one embedding")
    num_projected_tokens: int = _option(1, "different ones among them")
    max_length: int = _option(2048, "tokens of a sample at most, visual ones among them")
    packing: bool = _option(False, "short samples share a row")
    on_bad_records: str = _option("raise", "or skip: records without embedding or with a wrong placeholder")
    dtype: str | None = _option(None, "of the language model: auto, float32, bfloat16 or float16")
    trust_remote_code: bool = _option(False, "run code that comes with the model")
    resume: bool = _option(False, "go on from the last checkpoint in the output folder, if there is one")
    overwrite: bool = _option(False, "write into an output folder that is not empty")


@dataclass
class PretrainArguments(StageArguments):
    """What stage 1 takes beside them."""

    noise_std: float | None = _option(None, "noise of an element of an aligned embedding; default: the map's own")


@dataclass
class FinetuneArguments(StageArguments):
    """What stage 2 takes beside them; `realign finetune --help` says what each is."""

    lora_r: int | None = _option(None, "rank of LoRA; default: all weights are trained")
    lora_alpha: float | None = _option(None, "its scale; default: twice the rank")
    lora_dropout: float = _option(0.0, "its dropout")
    lora_target_modules: list[str] | None = _option(None, "layers it adapts; default: all linear ones")


@dataclass
class TrainerArguments(TrainingArguments):
    """`TrainingArguments` with the settings of the paper's first stage."""

    learning_rate: float = _option(5e-4, "the published one; stage 2: 1e-5")
    lr_scheduler_type: str = _option("cosine", "of the learning rate")
    warmup_steps: float = _option(0.03, "a share of all steps, or their number")
    num_train_epochs: float = _option(1.0, "how often all records are seen")
    remove_unused_columns: bool = _option(False, "the collator needs all")
    include_num_input_tokens_seen: str = _option("non_padding", "what counts as a token in tokens per second")
    logging_nan_inf_filter: bool = _option(False, "a loss that is not a number is shown as such")


@dataclass
class FinetuneTrainerArguments(TrainerArguments):
    """`TrainingArguments` with the settings of the second."""

    learning_rate: float = _option(1e-5, "the published one")


class ReVisionTrainer(Trainer):
    """transformers' Trainer, which writes the projector beside the model.

    Where the language model is frozen, checkpoints hold the projector alone, and have no `config.json`, so that none of
    them passes for a whole model.
    """

    data_collator: Any

    def get_eval_dataloader(self, *arguments: Any, **options: Any) -> Any:
        """Return it as transformers does, of the same arguments and options, without the noise of training."""
        noisy, self.data_collator = self.data_collator, replace(self.data_collator, noise_std=0.0)
        try:
            return super().get_eval_dataloader(*arguments, **options)
        finally:
            self.data_collator = noisy

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if self.args.should_save and isinstance(model, ReVisionForCausalLM):
            folder.mkdir(parents=True, exist_ok=True)
            state = model.state_dict() if state_dict is None else state_dict
            if projector := _projector_of(state):  # the identity has nothing to write
                _projectors.save(folder / _PROJECTOR, projector, "realign")
            frozen = not any(parameter.requires_grad for parameter in model.language_model.parameters())
            if frozen and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
                return
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_projector(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_projector(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_projector(self, checkpoint: str) -> bool:
        """Load a checkpoint that holds the projector alone, and return whether it is one; FSDP has its own."""
        path = Path(checkpoint) / _PROJECTOR
        if self.is_fsdp_enabled or not path.exists() or (path.parent / CONFIG_NAME).exists():
            return False
        self.accelerator.unwrap_model(self.model).load_projector(path)
        return True


class _Epochs(TrainerCallback):
    """Tells the records which epoch it is; Accelerate's loaders do so on one process only."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["train_dataloader"].dataset.set_epoch(int(state.epoch or 0))


def _projector_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = "projector."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def pretrain(arguments: PretrainArguments, training: TrainerArguments) -> dict[str, Any] | None:
    """Run stage 1: the language model is frozen, the projector learns from aligned text.

    Parameters
    ----------
    arguments
        What is trained, and on what.
    training
        How, as transformers takes it.

    Returns
    -------
    dict or None
        A summary; None in all processes but the first.

    Raises
    ------
    FileExistsError
        If the output folder is not empty, and neither `resume` nor `overwrite` is set.
    OSError, ValueError
        If a file, an argument or a record is wrong.
    """
    checkpoint, inputs = _begin(arguments, training)
    model, tokenizer = _load(arguments, inputs, arguments.dtype or "auto")
    model.freeze_language_model()
    stage = {"side": "source", "noise_std": arguments.noise_std}
    return _run(arguments, training, inputs, model, tokenizer, checkpoint, stage)


def finetune(arguments: FinetuneArguments, training: TrainerArguments) -> dict[str, Any] | None:
    """Run stage 2: real image embeddings; language model and projector learn, or LoRA and the projector.

    Takes, returns and raises as `pretrain`. A model trained with LoRA is written as a whole, with what LoRA has learnt
    added in; under FSDP and DeepSpeed its adapter is written.
    """
    checkpoint, inputs = _begin(arguments, training)
    model, tokenizer = _load(arguments, inputs, arguments.dtype or ("auto" if arguments.lora_r else "float32"))
    return _run(arguments, training, inputs, _with_lora(model, arguments), tokenizer, checkpoint, {"side": "target"})


def _with_lora(model: ReVisionForCausalLM, arguments: FinetuneArguments) -> Any:
    if arguments.lora_r is None:
        return model
    peft = import_extra("peft", "LoRA", extra="train")
    lora = peft.LoraConfig(
        r=arguments.lora_r,
        lora_alpha=2 * arguments.lora_r if arguments.lora_alpha is None else arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=_adapted(model, arguments.lora_target_modules),
        modules_to_save=["projector"],
    )
    return peft.get_peft_model(model, lora)


def _adapted(model: ReVisionForCausalLM, names: list[str] | None) -> list[str]:
    """Return the full names of the layers of the language model that LoRA is to adapt."""
    head = model.language_model.get_output_embeddings()
    found = [
        f"language_model.{name}"
        for name, module in model.language_model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        if names is None or name.split(".")[-1] in names
    ]
    if not found:
        raise ValueError(f"lora_target_modules: the language model has no linear layers {names}")
    return found


@dataclass
class _Inputs:
    """What stands for images: embeddings on disk, or an encoder of texts; and the alignment of their rows."""

    embeddings: EmbeddingDataset | None
    encoder: Any
    alignment: Alignment | None

    @property
    def dim(self) -> int:
        dim: int = self.encoder.dim if self.embeddings is None else self.embeddings.dim
        return dim


def _begin(arguments: StageArguments, training: TrainerArguments) -> tuple[str | None, _Inputs]:
    for name in ("model", "data"):
        if not getattr(arguments, name):
            raise ValueError(f"--{name} is missing")
    checkpoint = _where_to_begin(arguments, training)
    set_seed(training.seed)  # the Trainer does so too, but after there is a projector
    return checkpoint, _inputs(arguments, training)


def _inputs(arguments: StageArguments, training: TrainerArguments) -> _Inputs:
    if (arguments.embeddings is None) == (arguments.encoder is None):
        raise ValueError("pass either --embeddings, of the records, or --encoder, which makes them of captions")
    alignment = alignment_beside(arguments.model, arguments.alignment)
    if arguments.encoder is not None:
        from ..encode import TextEncoder

        encoder = TextEncoder(arguments.encoder, trust_remote_code=arguments.trust_remote_code)
        return _Inputs(None, encoder, alignment)
    with training.main_process_first(local=False):  # which makes the index
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
        index = Path(training.output_dir) / _INDEX
        embeddings = EmbeddingDataset(
            arguments.embeddings, ids=arguments.ids, id_column=arguments.id_column, index=index
        )
    return _Inputs(embeddings, None, alignment)


def alignment_beside(model: str, path: str | None) -> Alignment | None:
    """Return the alignment of this file, or else the one that a stage has left in the model's folder, if any."""
    beside = Path(model) / _ALIGNMENT
    return Alignment.load(path) if path is not None else Alignment.load(beside) if beside.exists() else None


def load_tokenizer(name: str, chat_template: str | None, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model, with a chat template from a file or "plain", if given."""
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        plain = chat_template == "plain"
        tokenizer.chat_template = PLAIN_TEMPLATE if plain else Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


def _load(arguments: StageArguments, inputs: _Inputs, dtype: str) -> tuple[ReVisionForCausalLM, Any]:
    trust = {"trust_remote_code": arguments.trust_remote_code}
    tokenizer = load_tokenizer(arguments.model, arguments.chat_template, **trust)
    image_token_id = add_image_token(tokenizer)
    if isinstance(AutoConfig.from_pretrained(arguments.model, **trust), ReVisionConfig):
        model = ReVisionForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    else:
        model = ReVisionForCausalLM.from_language_model(
            arguments.model,
            embedding_dim=inputs.dim,
            image_token_id=image_token_id,
            projector=arguments.projector_type,
            projector_dim=arguments.projector_dim,
            num_visual_tokens=arguments.num_visual_tokens,
            num_projected_tokens=arguments.num_projected_tokens,
            dtype=dtype,
            **trust,
        )
    if inputs.dim != model.config.embedding_dim:
        raise ValueError(
            f"the projector takes dimension {model.config.embedding_dim}, the embeddings have {inputs.dim}"
        )
    if arguments.projector is not None:
        model.load_projector(arguments.projector)
    return model, tokenizer


def _where_to_begin(arguments: StageArguments, training: TrainerArguments) -> str | None:
    """Return the last whole checkpoint to go on from, if asked for; refuse to write over another run."""
    folder = Path(training.output_dir)
    if training.resume_from_checkpoint:
        return str(training.resume_from_checkpoint)
    if arguments.resume:
        # The state is written last: a checkpoint without it was cut off.
        whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_STATE}")]
        return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None
    left = [path for path in folder.glob("*") if path.name != _INDEX]  # which a run that failed early leaves
    if left and not arguments.overwrite:
        raise FileExistsError(f"{folder} is not empty: pass --resume, --overwrite or another --output-dir")
    if training.process_index == 0:  # what is left of another run must not be gone on from
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(path)
    return None


def _run(
    arguments: StageArguments,
    training: TrainerArguments,
    inputs: _Inputs,
    model: Any,
    tokenizer: Any,
    checkpoint: str | None,
    stage: dict[str, Any],
) -> dict[str, Any] | None:
    def dataset_of(paths: list[str] | None) -> ReVisionDataset:
        records = Records(
            paths, embeddings=inputs.embeddings, id_key=arguments.id_key, on_bad_records=arguments.on_bad_records
        )
        return ReVisionDataset(records, tokenizer, prompt=arguments.prompt)

    bare = model if isinstance(model, ReVisionForCausalLM) else model.get_base_model()
    if arguments.packing:
        check_packing(bare)
    dataset = dataset_of(arguments.data)
    trainer = ReVisionTrainer(
        model,
        training,
        train_dataset=dataset,
        eval_dataset=None if arguments.eval_data is None else dataset_of(arguments.eval_data),
        processing_class=tokenizer,
        data_collator=ReVisionCollator(
            tokenizer,
            inputs.alignment,
            seed=training.seed,
            num_visual_tokens=bare.config.num_visual_tokens,
            max_length=arguments.max_length,
            packing=arguments.packing,
            encoder=inputs.encoder,
            dim=bare.config.embedding_dim,
            **stage,
        ),
        callbacks=[_Epochs()],
    )
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    elif not trainer.is_deepspeed_enabled and bare is not model:
        trainer.model = model.merge_and_unload()
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return None
    folder = Path(training.output_dir)
    if inputs.alignment is not None:
        inputs.alignment.save(folder / _ALIGNMENT)
    tokens = trainer.state.num_input_tokens_seen - trainer._initial_num_input_tokens_seen
    return {
        "output": str(folder),
        "records": len(dataset),
        "skipped": dataset.records.skipped,
        "steps": trainer.state.global_step,
        "loss": metrics["train_loss"],
        "seconds": metrics["train_runtime"],
        "samples_per_second": metrics["train_samples_per_second"],
        "tokens_per_second": round(tokens / metrics["train_runtime"], 1),
    }


_STAGES: dict[str, tuple[Any, Any, Any]] = {
    "pretrain": (PretrainArguments, TrainerArguments, pretrain),
    "finetune": (FinetuneArguments, FinetuneTrainerArguments, finetune),
}


def run_stage(name: str, argv: Sequence[str]) -> dict[str, Any] | None:
    """Run the stage that `name` says, "pretrain" or "finetune", with the flags `argv` of a command line; see there."""
    arguments, training, stage = _STAGES[name]
    parser = HfArgumentParser((arguments, training), prog=f"realign {name}", description=stage.__doc__.split("\n")[0])
    parsed = parser.parse_args_into_dataclasses(list(argv))
    with redirect_stdout(sys.stderr):  # where transformers prints its logs
        found: dict[str, Any] | None = stage(*parsed)
    return found

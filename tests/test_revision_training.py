"""The two stages: what is trained, what is written, going on after a stop, and what transformers brings to them."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import realign_fast as rf
from realign_fast.cli import main
from realign_fast.encode import ImageEncoder, TextEncoder, embed_images, embed_texts
from realign_fast.revision import ReVisionForCausalLM
from realign_fast.revision.data import ReVisionDataset
from realign_fast.revision.training import ReVisionTrainer, TrainerArguments, run_stage

DIM, COUNT = 12, 24
WORDS = ["a", "red", "green", "blue", "box", "ball", "ring", "left", "right", "describe", "."]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }} {{ m['content'] }} {% if m['role'] == 'assistant' %}<end> "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A language model, records with ids, embeddings of both sides, and an alignment."""
    folder = tmp_path_factory.mktemp("world")
    names = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(names), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "lm")
    fast.save_pretrained(folder / "lm")
    rng = np.random.default_rng(0)
    ids = [f"scene-{number}" for number in range(COUNT)]
    with (folder / "captions.jsonl").open("w") as file:
        for each in ids:
            caption = " ".join(rng.choice(WORDS[:9], size=int(rng.integers(3, 8))))
            file.write(json.dumps({"id": each, "caption": caption}) + "\n")
    for side, offset in (("text", 0.5), ("image", -0.5)):
        (folder / side).mkdir()
        rows = rng.normal(size=(COUNT, DIM)) + offset
        np.save(folder / side / "part.npy", rows.astype(np.float32))
        parquet.write_table(pa.table({"id": ids}), folder / side / "part.columns.parquet")
    rf.fit(folder / "text", folder / "image").save(folder / "a.safetensors")
    return folder


keep = ReVisionDataset.set_epoch

COMMON = [
    "--per_device_train_batch_size", 4, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true",
    "--logging_steps", 1, "--save_steps", 2, "--save_strategy", "steps", "--max_length", 32,
]  # fmt: skip


def flags_of(world: Path, out: Path, *more: object, stage: str = "pretrain") -> list[str]:
    flags = ["--data", world / "captions.jsonl", "--output_dir", out, *COMMON]
    if stage == "pretrain":
        flags += ["--model", world / "lm", "--embeddings", world / "text", "--alignment", world / "a.safetensors"]
        flags += ["--num_visual_tokens", 4, "--num_projected_tokens", 2]
    else:
        flags += ["--embeddings", world / "image"]
    return [str(each) for each in (*flags, *more)]


def pretrain(world: Path, out: Path, *more: object):
    return run_stage("pretrain", flags_of(world, out, *more))


def finetune(world: Path, out: Path, *more: object):
    return run_stage("finetune", flags_of(world, out, *more, stage="finetune"))


def losses_of(out: Path, step: int = 6) -> list[float]:
    state = json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def first(world, tmp_path_factory):
    """A finished first stage, and its summary."""
    out = tmp_path_factory.mktemp("first") / "out"
    return out, pretrain(world, out)


@pytest.fixture(scope="module")
def second(world, first, tmp_path_factory):
    out = tmp_path_factory.mktemp("second") / "out"
    return out, finetune(world, out, "--model", first[0], "--learning_rate", "1e-2")


def test_a_model_whose_projector_is_the_identity_is_written_too(world, tmp_path):
    options = {"embedding_dim": 16, "image_token_id": 9, "projector": "identity"}
    model = ReVisionForCausalLM.from_language_model(world / "lm", **options)
    training = TrainerArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")
    ReVisionTrainer(model, training).save_model()
    assert not (tmp_path / "out" / "projector.safetensors").exists()
    assert ReVisionForCausalLM.from_pretrained(tmp_path / "out").config.projector == "identity"


def test_stage_one_leaves_the_language_model_as_it_was(world, first):
    out, _ = first
    before = load_file(world / "lm" / "model.safetensors")
    after = ReVisionForCausalLM.from_pretrained(out).language_model.state_dict()
    assert set(before) <= set(after)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_stage_one_trains_the_projector(first):
    out, summary = first
    early, late = (load_file(out / f"checkpoint-{step}" / "projector.safetensors") for step in (2, 6))
    assert all(not torch.equal(early[name], late[name]) for name in early)
    model = ReVisionForCausalLM.from_pretrained(out)
    for name, value in load_file(out / "projector.safetensors").items():
        assert torch.equal(value, late[name])
        assert torch.equal(value, model.state_dict()[name])
    assert summary["steps"] == 6
    assert summary["records"] == COUNT
    assert summary["skipped"] == {}
    assert summary["tokens_per_second"] > summary["samples_per_second"] > 0


def test_checkpoints_of_stage_one_hold_the_projector_and_pass_for_no_model(world, first, tmp_path):
    checkpoint = first[0] / "checkpoint-6"
    assert not (checkpoint / "config.json").exists()
    assert not list(checkpoint.glob("model*"))
    with pytest.raises((OSError, ValueError)):
        finetune(world, tmp_path / "out", "--model", checkpoint)


def test_tokens_per_second_are_logged(first):
    state = json.loads((first[0] / "checkpoint-6" / "trainer_state.json").read_text())
    assert all(entry["train_tokens_per_second"] > 0 for entry in state["log_history"])


def test_both_stages_go_on_to_the_same_losses_twice(world, first, second, tmp_path):
    for out, run in (
        (first[0], lambda to: pretrain(world, to, "--resume")),
        (second[0], lambda to: finetune(world, to, "--model", first[0], "--learning_rate", "1e-2", "--resume")),
    ):
        copy = tmp_path / out.parent.name
        shutil.copytree(out, copy)
        for last in (2, 4):
            for step in range(last + 2, 7, 2):
                shutil.rmtree(copy / f"checkpoint-{step}")
            # One that was cut off while it was written.
            (copy / f"checkpoint-{last + 2}").mkdir()
            (copy / f"checkpoint-{last + 2}" / "projector.safetensors").write_bytes(b"half")
            assert run(copy)["steps"] == 6
            assert losses_of(copy) == losses_of(out)
        ours, theirs = (load_file(folder / "projector.safetensors") for folder in (copy, out))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume_begins_where_there_is_nothing_to_go_on_from(world, tmp_path):
    assert pretrain(world, tmp_path / "new", "--resume", "--max_steps", 1)["steps"] == 1


def test_accumulated_gradients_are_those_of_the_large_batch(world, first, tmp_path):
    out = tmp_path / "out"
    more = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4]
    pretrain(world, out, *more)
    np.testing.assert_allclose(losses_of(out), losses_of(first[0]), rtol=2e-5)
    ours, theirs = (load_file(folder / "projector.safetensors") for folder in (out, first[0]))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)


def test_packed_rows_have_the_losses_of_single_ones(world, first, tmp_path):
    out = tmp_path / "out"
    pretrain(world, out, "--packing")
    np.testing.assert_allclose(losses_of(out), losses_of(first[0]), rtol=2e-5)


def test_noise_is_an_option_of_the_first_stage(world, first, tmp_path, monkeypatch):
    epochs = []
    monkeypatch.setattr(ReVisionDataset, "set_epoch", lambda self, epoch: (epochs.append(epoch), keep(self, epoch)))
    out = tmp_path / "out"
    more = ["--noise_std", 0.1, "--num_train_epochs", 2, "--eval_strategy", "epoch"]
    pretrain(world, out, *more, "--eval_data", world / "captions.jsonl")
    assert losses_of(out) != losses_of(first[0])
    assert set(epochs) == {0, 1}
    undisturbed = losses_of(out, 12)
    for step in (10, 12):
        shutil.rmtree(out / f"checkpoint-{step}")
    pretrain(world, out, *more, "--eval_data", world / "captions.jsonl", "--resume")
    assert losses_of(out, 12) == undisturbed
    # Evaluation has no noise: it tells what the projector of the last step makes of the records as they are.
    state = json.loads((out / "checkpoint-12" / "trainer_state.json").read_text())
    found = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry][-1]
    quiet = pretrain(world, tmp_path / "quiet", "--projector", out / "projector.safetensors", "--learning_rate", 0)
    np.testing.assert_allclose(quiet["loss"], found, rtol=1e-3)


def test_stage_two_trains_all_weights_and_keeps_the_alignment(first, second):
    before, after = (ReVisionForCausalLM.from_pretrained(out).state_dict() for out in (first[0], second[0]))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert rf.Alignment.load(second[0] / "alignment.safetensors").fingerprint == (
        rf.Alignment.load(first[0] / "alignment.safetensors").fingerprint
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which peft asks for
def test_lora_is_written_as_part_of_the_model(world, first, tmp_path):
    out = tmp_path / "out"
    more = ["--model", first[0], "--learning_rate", "1e-2", "--lora_r", 2]
    finetune(world, out, *more)
    before, after = (ReVisionForCausalLM.from_pretrained(folder).state_dict() for folder in (first[0], out))
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in changed
    assert "projector.0.weight" in changed
    assert "language_model.lm_head.weight" not in changed
    assert "language_model.model.embed_tokens.weight" not in changed
    undisturbed = losses_of(out)
    for step in (4, 6):
        shutil.rmtree(out / f"checkpoint-{step}")
    finetune(world, out, *more, "--resume")
    assert losses_of(out) == undisturbed


def test_evaluation_and_the_best_checkpoint(world, tmp_path):
    out = tmp_path / "out"
    more = ["--eval_data", world / "captions.jsonl", "--eval_strategy", "steps", "--eval_steps", 2]
    pretrain(world, out, *more, "--load_best_model_at_end", "true", "--metric_for_best_model", "loss")
    state = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())
    best = load_file(Path(state["best_model_checkpoint"]) / "projector.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in load_file(out / "projector.safetensors").items())


def test_metrics_go_to_tensorboard(world, tmp_path):
    logs = tmp_path / "logs"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)
    try:
        pretrain(world, tmp_path / "out", "--report_to", "tensorboard", "--max_steps", 1)
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    assert list(logs.rglob("events.out.tfevents.*"))


@pytest.fixture(scope="module")
def clip(world) -> Path:
    """A small CLIP that reads these captions, whose embeddings have the dimension of the others."""
    folder = world / "clip"
    tower = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 16, "max_position_embeddings": 12, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    torch.manual_seed(1)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world / "lm").save_pretrained(folder)
    return folder


def test_captions_are_encoded_on_their_way(world, clip, tmp_path):
    embed_texts(TextEncoder(clip), world / "captions.jsonl", tmp_path / "text")
    image = np.random.default_rng(1).normal(size=(50, DIM)).astype(np.float32)
    np.save(tmp_path / "image.npy", image)
    rf.fit(tmp_path / "text", tmp_path / "image.npy").save(tmp_path / "a.safetensors")
    aligned = ["--alignment", tmp_path / "a.safetensors"]
    pretrain(world, tmp_path / "stored", "--embeddings", tmp_path / "text", *aligned)
    flags = flags_of(world, tmp_path / "encoded", *aligned, "--encoder", clip)
    at = flags.index("--embeddings")
    run_stage("pretrain", [*flags[:at], *flags[at + 2 :]])
    np.testing.assert_allclose(losses_of(tmp_path / "encoded"), losses_of(tmp_path / "stored"), rtol=1e-5)

    other = rf.fit(tmp_path / "text", tmp_path / "image.npy", encoder="another")
    other.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="'another'"):
        run_stage("pretrain", [*flags[:at], *flags[at + 2 :], "--overwrite"])


def test_generate_looks_at_images(world, first, clip, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    embed_images(ImageEncoder(clip), tmp_path / "images", tmp_path / "image")
    flags = ["--model", first[0], "--max-new-tokens", 3, "--prompt", "describe ."]
    for more in (["--images", tmp_path / "images", "--encoder", clip], ["--embeddings", tmp_path / "image"]):
        assert main(["generate", *map(str, [*flags, *more, "-o", tmp_path / f"{more[0][2:]}.jsonl"])]) == 0
    said = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("images", "embeddings")
    ]
    assert [line["id"] for line in said[0]] == ["0", "1", "2"]
    assert [line["text"] for line in said[0]] == [line["text"] for line in said[1]]


def test_generate_says_something_of_each_image(world, first, tmp_path):
    out = tmp_path / "said.jsonl"
    index = tmp_path / "ids.index"
    flags = ["--model", first[0], "--embeddings", world / "image", "--index", index, "-o", out, "--max-new-tokens", 3]
    assert main(["generate", *map(str, flags), "--batch-size", "5"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"scene-{number}" for number in range(COUNT)]
    model = ReVisionForCausalLM.from_pretrained(first[0]).eval()
    tokenizer = AutoTokenizer.from_pretrained(first[0])
    row = rf.Alignment.load(first[0] / "alignment.safetensors").transform(
        torch.from_numpy(np.load(world / "image" / "part.npy")[7:8]), side="target"
    )
    prompt = tokenizer("<user> <image> <assistant>", add_special_tokens=False)["input_ids"]
    prompt = torch.tensor([[prompt[0], *[prompt[1]] * 4, prompt[2]]])
    said = model.generate(prompt, row, max_new_tokens=3)
    assert lines[7]["text"] == tokenizer.decode(said[0], skip_special_tokens=True).strip()


def test_a_folder_that_is_not_empty_is_refused(world, first):
    with pytest.raises(FileExistsError, match="--resume, --overwrite"):
        pretrain(world, first[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--embeddings", "nowhere"], "nowhere"),
        (["--encoder", "x"], "either --embeddings"),
        (["--projector_type", "identity"], "identity"),
    ],
)
def test_wrong_arguments_end_in_one_line(world, tmp_path, capsys, more, message):
    assert main(["pretrain", *flags_of(world, tmp_path / "out", *more)]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("realign pretrain: ")
    assert message in last


def test_embeddings_of_another_dimension_than_the_projector(world, first, tmp_path):
    np.save(tmp_path / "part.npy", np.ones((COUNT, DIM + 1), np.float32))
    shutil.copy(world / "image" / "part.columns.parquet", tmp_path)
    with pytest.raises(ValueError, match=f"{DIM}.*{DIM + 1}"):
        finetune(world, tmp_path / "out", "--model", first[0], "--embeddings", tmp_path / "part.npy")


def test_records_without_embedding_are_counted(world, tmp_path):
    data = tmp_path / "more.jsonl"
    data.write_text((world / "captions.jsonl").read_text() + json.dumps({"id": "other", "caption": "a box"}) + "\n")
    with pytest.raises(ValueError, match="'other'"):
        pretrain(world, tmp_path / "out", "--data", data)
    (tmp_path / "out" / "checkpoint-old").mkdir()
    summary = pretrain(world, tmp_path / "out", "--data", data, "--on_bad_records", "skip", "--max_steps", 1,
                       "--overwrite")  # fmt: skip
    assert not (tmp_path / "out" / "checkpoint-old").exists()
    assert summary["records"] == COUNT
    assert [each["count"] for each in summary["skipped"].values()] == [1]


def test_the_command_has_all_flags_of_transformers():
    done = subprocess.run(
        [sys.executable, "-m", "realign_fast", "pretrain", "--help"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    for flag in ("--gradient_accumulation_steps", "--deepspeed", "--fsdp", "--noise_std", "--num_visual_tokens"):
        assert flag in done.stdout


def test_the_trainer_is_thin():
    """Lines of code: transformers does the loop, checkpoints, mixed precision and distribution."""
    count = 0
    for path in (Path(rf.__file__).parent / "revision").glob("*.py"):
        said = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                said.update(range(node.lineno, node.end_lineno + 1))
        lines = enumerate(path.read_text().splitlines(), 1)
        count += sum(bool(line.strip()) and not line.strip().startswith("#") and n not in said for n, line in lines)
    assert count < 900


@pytest.mark.slow
def test_two_ranks_of_fsdp_train_and_write_the_projector(world, first, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    flags = flags_of(world, out, "--per_device_train_batch_size", 2, "--fsdp", "full_shard")
    done = subprocess.run(
        [*command, "realign_fast", "pretrain", *flags],
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["steps"] == 6
    ours, theirs = (load_file(folder / "projector.safetensors") for folder in (out, first[0]))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-2, atol=1e-4)

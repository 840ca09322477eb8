"""Texts and images through small dual encoders: values, ids, shards, what is refused, and jobs that go on."""

import csv
import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import realign_fast as rf
from realign_fast.cli import main
from realign_fast.io.sources import SIDECAR

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

from realign_fast import encode  # noqa: E402
from realign_fast.data import EmbeddingDataset  # noqa: E402
from realign_fast.encode import ImageEncoder, TextEncoder, embed_images, embed_texts  # noqa: E402
from realign_fast.io.writer import verify  # noqa: E402

DIM = 16
WORDS = ["a", "red", "blue", "green", "round", "square", "thing", "on", "the", "left", "right"]
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TOWER, "vocab_size": len(WORDS) + 4, "max_position_embeddings": 12, "pad_token_id": 0, "eos_token_id": 2}
VISION = {**TOWER, "image_size": 16, "patch_size": 8}
PIXELS = {"size": {"height": 16, "width": 16}, "do_center_crop": False}


def save_tokenizer(folder: Path, **special: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["[pad]", "[start]", "[end]", "[unk]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[start] $0 [end]", special_tokens=[("[start]", 1), ("[end]", 2)]
    )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[unk]", bos_token="[start]", eos_token="[end]", **special
    )
    wrapped.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Return the folders of small models by their kind."""
    root = tmp_path_factory.mktemp("models")
    clip = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=DIM)
    siglip = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    torch.manual_seed(0)
    for name, model, processor in (
        ("clip", transformers.CLIPModel(clip), transformers.CLIPImageProcessorPil(**PIXELS)),
        ("siglip", transformers.SiglipModel(siglip), transformers.SiglipImageProcessorPil(**PIXELS)),
    ):
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
        save_tokenizer(root / name, pad_token="[pad]")
    return {name: root / name for name in ("clip", "siglip")}


@pytest.fixture(scope="module")
def text_encoder(models) -> TextEncoder:
    return TextEncoder(models["clip"], batch_size=4)


@pytest.fixture(scope="module")
def image_encoder(models) -> ImageEncoder:
    return ImageEncoder(models["clip"], batch_size=3)


def captions(count: int) -> list[str]:
    rng = np.random.default_rng(count)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]


def picture(seed: int, size: tuple[int, int] = (20, 16)) -> "Image.Image":
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Return a file of 50 texts."""
    path = tmp_path_factory.mktemp("texts") / "captions.txt"
    path.write_text("\n".join(captions(50)))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Return a folder of 40 images, in it and below it."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "b" / "c").mkdir(parents=True)
    for number in range(40):
        picture(number).save(folder / ("" if number % 2 else "b/c") / f"image_{number}.png")
    return folder


@pytest.fixture
def realign(capsys):
    """Return a function that runs a command and returns its exit code, its summary and the last line of its stderr."""

    def run(*arguments: object) -> tuple[int, dict | None, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        lines = out.splitlines()
        return code, json.loads(lines[0]) if lines else None, (err.splitlines() or [""])[-1]

    return run


def rows_of(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])


def ids_of(folder: Path) -> list:
    return [
        each for path in sorted(folder.glob(f"*{SIDECAR}.parquet")) for each in pq.read_table(path)["id"].to_pylist()
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- encoders -------------------------------------------------------------------------------------------------------


def by_hand(folder: Path, name: str, given: list) -> "torch.Tensor":
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        if not isinstance(given[0], str):
            inputs = transformers.AutoImageProcessor.from_pretrained(folder)(given, return_tensors="pt")
            return model.get_image_features(**inputs).pooler_output
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if name == "clip":
            inputs = tokenizer(given, padding=True, return_tensors="pt")
            return model.get_text_features(**inputs).pooler_output
        tokens = tokenizer(given, padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
        return model.get_text_features(input_ids=tokens).pooler_output


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_embeddings_are_those_of_the_model(models, name):
    given = captions(5)
    encoder = TextEncoder(models[name], batch_size=8)
    assert (encoder.dim, encoder(given).dtype) == (DIM, torch.float32)
    torch.testing.assert_close(encoder(given), by_hand(models[name], name, given), rtol=0, atol=0)
    pictures = [picture(seed) for seed in range(5)]
    encoder = ImageEncoder(models[name], batch_size=8)
    torch.testing.assert_close(encoder(pictures), by_hand(models[name], name, pictures), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_long_texts_are_cut_off_and_batches_change_nothing(models, name):
    encoder = TextEncoder(models[name], batch_size=2)
    given = ["red " * 50, *captions(4)]
    together = encoder(given)
    assert together.isfinite().all()
    torch.testing.assert_close(together, torch.cat([encoder([text]) for text in given]))
    assert encoder([]).shape == (0, DIM)
    with pytest.raises(TypeError, match="list of texts"):
        encoder("red")


def test_encoders_are_frozen_and_have_one_name_for_both_sides(models, text_encoder, image_encoder, tmp_path):
    assert text_encoder.name == image_encoder.name
    assert text_encoder.name.startswith("clip@")
    assert TextEncoder(models["siglip"]).name != text_encoder.name
    found = text_encoder(captions(3))
    assert not found.requires_grad
    assert not any(weights.requires_grad for weights in text_encoder._model.parameters())
    weights = torch.nn.Parameter(torch.ones(DIM))
    (found * weights).sum().backward()  # what comes out may be trained on
    again = pickle.loads(pickle.dumps(text_encoder))
    assert torch.equal(again(captions(3)), found)
    half = TextEncoder(models["clip"], dtype=torch.bfloat16)
    assert half.name == text_encoder.name
    torch.testing.assert_close(half(captions(3)), found, rtol=0.05, atol=0.05)
    model = transformers.AutoModel.from_pretrained(models["clip"])
    with torch.no_grad():
        model.vision_model.post_layernorm.bias += 0.01
    model.save_pretrained(tmp_path / "clip")
    save_tokenizer(tmp_path / "clip", pad_token="[pad]")
    assert TextEncoder(tmp_path / "clip").name != text_encoder.name


def test_unusable_models_are_refused(models, tmp_path):
    bert = transformers.BertModel(transformers.BertConfig(**TOWER, vocab_size=9, max_position_embeddings=4))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="'bert' without get_text_features"):
        TextEncoder(tmp_path / "bert")
    model = transformers.AutoModel.from_pretrained(models["clip"])
    model.save_pretrained(tmp_path / "clip")
    save_tokenizer(tmp_path / "clip")
    with pytest.raises(ValueError, match="no padding token"):
        TextEncoder(tmp_path / "clip")
    state = model.state_dict()
    (tmp_path / "clip" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"safetensors"):
        TextEncoder(tmp_path / "clip")
    del state["text_projection.weight"]
    model.save_pretrained(tmp_path / "clip", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights, the first is 'text_projection.weight'"):
        TextEncoder(tmp_path / "clip")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TextEncoder(models["clip"], batch_size=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds no GPU"):
            TextEncoder(models["clip"], device="cuda")


def test_a_batch_too_large_says_what_to_do(text_encoder, monkeypatch):
    def full(**_: object) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(text_encoder._model, "get_text_features", full)
    with pytest.raises(MemoryError, match="batch of 4 does not fit on cpu: choose a smaller batch_size"):
        text_encoder(["red"])


# ---- texts ----------------------------------------------------------------------------------------------------------


def write_texts(path: Path, ids: list, given: list[str]) -> Path:
    """Write texts as the suffix says; records alternate between the forms that LLaVA and Bunny have."""
    records = [
        {"id": each, "caption": text}
        if number % 2
        else {
            "id": each,
            "image": f"{each}.jpg",
            "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": text}],
        }
        for number, (each, text) in enumerate(zip(ids, given, strict=True))
    ]
    match path.suffix:
        case ".txt":
            path.write_text("".join(f"{text}\r\n" for text in given))
        case ".jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        case ".json":
            path.write_text(json.dumps(records, indent=1))
        case ".csv":
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([("text", "id"), *zip(given, ids, strict=True)])
        case ".parquet":
            pq.write_table(pa.table({"caption": given, "id": ids}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_texts_of_all_formats(text_encoder, tmp_path, suffix):
    given = captions(10)
    given[3] = given[3].replace(" ", "  ")
    numbers = suffix in (".txt", ".parquet")
    ids = list(range(10)) if numbers else [f"{number:03}" for number in range(10)]
    path = write_texts(tmp_path / f"texts{suffix}", ids, given)
    summary = embed_texts(text_encoder, path, tmp_path / "out", shard_rows=4)
    assert (summary["rows"], summary["files"], summary["bad_rows"]) == (10, 3, 0)
    assert ids_of(tmp_path / "out") == ids
    parts = [text_encoder(given[start : start + 4]).numpy() for start in (0, 4, 8)]
    assert np.array_equal(rows_of(tmp_path / "out"), np.concatenate(parts))
    assert verify(tmp_path / "out") == {"ok": True, "problems": [], "files": 3, "rows": 10, "bytes": summary["bytes"]}
    dataset = EmbeddingDataset(tmp_path / "out", index=tmp_path / "index")
    (row,) = dataset.numbers_of([ids[7]])
    assert dataset[row]["id"] == ids[7]
    assert np.array_equal(dataset[row]["embedding"].numpy(), parts[1][3])


def test_columns_and_float16(text_encoder, tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text('key,text,other\n7,"red, ""round""\nthing",a\n8,blue,b\n')
    embed_texts(text_encoder, path, tmp_path / "out", id_column="key", text_column="text", dtype="float16")
    expected = text_encoder(['red, "round"\nthing', "blue"]).half().numpy()
    assert np.array_equal(rows_of(tmp_path / "out"), expected)
    assert ids_of(tmp_path / "out") == ["7", "8"]
    with pytest.raises(ValueError, match="must have columns 'id' and 'caption' or 'conversations' or 'text'"):
        embed_texts(text_encoder, path, tmp_path / "other")


BAD = {
    "empty.txt": ("red\n  \nblue\n", "row 1: it has no text", 2),
    "bytes.txt": (b"red\nblue\xff\n", "row 1: 'utf-8' codec can't decode", 1),
    "text.jsonl": (
        '{"id": 1, "caption": "red"}\n{"id": 2, "caption": 5}\n',
        "row 1: its text must be text, got '5'",
        1,
    ),
    "half.jsonl": ('{"id": 1, "caption": "red"}\n{"id": 2, "caption": "\\ud800"}\n', "row 1: .*surrogates", 1),
    "answer.json": (
        '[{"id": "x", "conversations": [{"from": "human", "value": "red"}]}, {"id": "y", "text": "red"}]',
        "row 0: it has no text",
        1,
    ),
    "id.json": ('[{"id": "x", "text": "red"}, {"text": "red"}]', "row 1: its 'id' must be text or an integer", 1),
    "large.json": (f'[{{"id": {2**63}, "text": "red"}}, {{"id": 1, "text": "red"}}]', "row 0: its 'id' must be", 1),
    "short.csv": ("id,text\n1,red\n2\n", "row 1: it has no text", 1),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_texts_are_refused_or_left_out(text_encoder, tmp_path, name):
    data, says, num_rows = BAD[name]
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ValueError, match=says) as caught:
        embed_texts(text_encoder, path, tmp_path / "out")
    assert str(caught.value).startswith(str(path))
    assert "on_bad_rows='skip'" in str(caught.value)
    summary = embed_texts(text_encoder, path, tmp_path / "out", on_bad_rows="skip", overwrite=True)
    assert (summary["rows"], summary["bad_rows"], len(summary["left_out"])) == (num_rows, 1, 1)
    assert summary["left_out"][0].startswith(f"{path}: row")
    assert verify(tmp_path / "out")["ok"]


REFUSED = {
    "none.txt": ("", "holds no texts"),
    "none.json": (" [ ] ", "holds no texts"),
    "other.yaml": ("a: b", "must be in a file of suffix .txt, .jsonl, .json, .csv, .parquet"),
    "damaged.jsonl": ('{"id": 1, "caption": "red"}\n{"id": 2, \n', "record 1 at byte 28: damaged or cut short"),
    "list.jsonl": ('{"id": 1, "caption": "red"}\n7\n', "record 1 at byte 28: expected an object, got '7'"),
    "cut.json": ('[{"id": 1, "text": "red"}, {"id": 2', "record 1 at byte 27: damaged or cut short"),
    "deep.json": ('[{"id": ' + "[" * 100_000, "record 0 at byte 1: nested too deep"),
    "bytes.csv": (b"id,text\n\xff,red\n", "is damaged: 'utf-8' codec can't decode"),
    "field.csv": (f"id,text\n1,{'a' * 200_000}\n", "is damaged: field larger than field limit"),
    "no.parquet": ("PAR1", "is damaged or in an unknown format"),
    "mixed.jsonl": (
        '{"id": 1, "text": "red"}\n{"id": "b", "text": "red"}\n',
        "row 1: its id is 'b', those before are integers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_no_texts_are_refused(text_encoder, tmp_path, name):
    data, says = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ValueError, match=says) as caught:
        embed_texts(text_encoder, path, tmp_path / "out", on_bad_rows="skip")
    assert str(path) in str(caught.value)


def test_embeddings_that_are_no_rows_are_refused_or_left_out(text_encoder, texts, tmp_path, monkeypatch):
    inner = text_encoder.features
    calls: list[int] = []

    def spoilt(inputs: dict) -> "torch.Tensor":
        found = inner(inputs)
        if not calls:
            found[1], found[2, 3], found[3, 0] = 0, torch.nan, 1e6
        calls.append(1)
        return found

    monkeypatch.setattr(text_encoder, "features", spoilt)
    with pytest.raises(ValueError, match="row 1: its embedding is zero or not finite in float16"):
        embed_texts(text_encoder, texts, tmp_path / "out", dtype="float16")
    calls.clear()
    embed_texts(text_encoder, texts, tmp_path / "out", dtype="float16", on_bad_rows="skip", overwrite=True)
    assert ids_of(tmp_path / "out") == [0, *range(4, 50)]
    assert verify(tmp_path / "out")["ok"]


def test_wrong_options_are_refused(text_encoder, texts, tmp_path):
    for options, says in (
        ({"dtype": "bfloat16"}, "dtype must be float16 or float32, got 'bfloat16'"),
        ({"shard_rows": 0}, "shard_rows must be at least 1, got 0"),
        ({"on_bad_rows": "zero"}, "on_bad_rows must be raise or skip, got 'zero'"),
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
    ):
        with pytest.raises(ValueError, match=says):
            embed_texts(text_encoder, texts, tmp_path / "out", **options)


# ---- images ---------------------------------------------------------------------------------------------------------


def test_images_in_natural_order_with_ids(image_encoder, images, tmp_path):
    summary = embed_images(image_encoder, images, tmp_path / "out", shard_rows=16)
    assert (summary["rows"], summary["files"]) == (40, 3)
    ids = [f"b/c/image_{number}" for number in range(0, 40, 2)] + [f"image_{number}" for number in range(1, 40, 2)]
    assert ids_of(tmp_path / "out") == ids
    expected = image_encoder([picture(int(each.split("_")[1])) for each in ids])
    np.testing.assert_allclose(rows_of(tmp_path / "out"), expected, atol=1e-6)
    dataset = EmbeddingDataset(tmp_path / "out", index=tmp_path / "index")
    np.testing.assert_allclose(dataset["image_33"]["embedding"], image_encoder([picture(33)])[0], atol=1e-6)
    assert verify(tmp_path / "out")["ok"]


def test_images_are_turned_upright_and_made_rgb(image_encoder, tmp_path):
    turned = picture(0).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise
    (tmp_path / "in").mkdir()
    turned.save(tmp_path / "in" / "a.png", exif=exif)
    picture(1).convert("L").save(tmp_path / "in" / "b.PNG")
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    (tmp_path / "in" / ".hidden").mkdir()
    picture(2).save(tmp_path / "in" / ".hidden" / "c.png")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere").mkdir()
    picture(3).save(tmp_path / "elsewhere" / "d.png")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    embed_images(image_encoder, tmp_path / "in", tmp_path / "out")
    assert ids_of(tmp_path / "out") == ["a", "b", "link/d"]
    given = [picture(0), picture(1).convert("L").convert("RGB"), picture(3)]
    np.testing.assert_allclose(rows_of(tmp_path / "out"), image_encoder(given), atol=1e-6)


def test_bad_images_are_refused_or_left_out(image_encoder, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        picture(number).save(folder / f"{number}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:300])
    (folder / "2.png").write_text("not an image")
    os.rename(os.fsencode(folder / "0.png"), os.fsencode(folder) + b"/\xff.png")
    picture(5, (80, 80)).save(folder / "4.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(ValueError, match=r"1\.png: no usable image: .*truncated"):
        embed_images(image_encoder, folder, tmp_path / "out")
    summary = embed_images(image_encoder, folder, tmp_path / "out", on_bad_rows="skip", overwrite=True)
    assert (summary["rows"], summary["bad_rows"]) == (1, 4)
    assert ids_of(tmp_path / "out") == ["3"]
    assert verify(tmp_path / "out")["ok"]
    reasons = ("truncated", "cannot identify", "exceeds limit", "surrogates not allowed")
    names = ("1.png", "2.png", "4.png", "\udcff.png")
    for line, name, reason in zip(summary["left_out"], names, reasons, strict=True):
        assert line.startswith(f"{folder / name}: ")
        assert reason in line
    (folder / "3.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"3\.(png|jpg) and .*3\.(png|jpg) would both have the id '3'"):
        embed_images(image_encoder, folder, tmp_path / "out", overwrite=True)


def test_folders_without_images_are_refused(image_encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no images"):
        embed_images(image_encoder, tmp_path, tmp_path / "out")
    with pytest.raises(NotADirectoryError, match="must be a directory of images"):
        embed_images(image_encoder, tmp_path / "none", tmp_path / "out")


# ---- jobs that end early --------------------------------------------------------------------------------------------

# Without transformers, which takes long to load.
STUB = """
import os, signal, sys, torch
from realign_fast.encode import embed_texts
class Encoder:
    name, dim, batch_size = "stub", 4, 5
    def __init__(self, left):
        self.left = left
    def collate(self, texts):
        return {"rows": torch.tensor([[len(text), text.count("a"), text.count("e"), 1.0] for text in texts])}
    def features(self, inputs):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return inputs["rows"]
if __name__ == "__main__":
    embed_texts(Encoder(int(sys.argv[3])), sys.argv[1], sys.argv[2], shard_rows=12)
"""


def test_a_killed_job_goes_on_to_the_same_bytes(texts, tmp_path):
    stub, out = tmp_path / "stub.py", tmp_path / "out"
    stub.write_text(STUB)
    killed_at = 8  # in the third shard, of three batches each
    done = subprocess.run([sys.executable, stub, texts, out, str(killed_at)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in out.glob("*.npy")) == ["embed_00000.npy", "embed_00001.npy"]
    (out / ".embed_00002.npy.tmp-01234567").write_bytes(b"torn")
    encoder = runpy.run_path(str(stub))["Encoder"](0)
    embed_texts(encoder, texts, tmp_path / "whole", shard_rows=12)
    num_batches = -encoder.left
    summary = embed_texts(encoder, texts, out, shard_rows=12, resume=True)
    assert summary["skipped_files"] == 2
    assert -encoder.left == num_batches + num_batches - 6
    assert contents(out) == contents(tmp_path / "whole")
    assert verify(out)["ok"]


@pytest.mark.parametrize("side", ["text", "image"])
def test_a_job_that_is_asked_to_end_goes_on_to_the_same_bytes(
    models, texts, images, tmp_path, realign, side, monkeypatch
):
    given = ("--texts", texts) if side == "text" else ("--images", images)
    job = ("embed", "--model", models["siglip"], *given, "--batch-size", 4, "--shard-rows", 10, "-o")
    code, summary, _ = realign(*job, tmp_path / "whole")
    assert code == 0
    inner, calls = encode._Run.embed, []

    def stopping(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encode._Run, "embed", stopping)
        code, nothing, line = realign(*job, tmp_path / "out")
    kept = f"finished files are kept in {tmp_path / 'out'}, go on with --resume"
    assert (code, nothing, line) == (143, None, f"realign embed: stopped by SIGTERM: {kept}")
    code, nothing, line = realign(*job, tmp_path / "out")
    assert (code, nothing) == (1, None)
    assert "is not empty" in line
    code, resumed, _ = realign(*job, tmp_path / "out", "--resume")
    assert (code, resumed["skipped_files"]) == (0, 2)
    assert {**resumed, "seconds": 0, "skipped_files": 0, "output": ""} == {**summary, "seconds": 0, "output": ""}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_job_is_not_resumed(models, text_encoder, image_encoder, tmp_path):
    path = write_texts(tmp_path / "a.txt", list(range(8)), captions(8))
    embed_texts(text_encoder, path, tmp_path / "out", shard_rows=4)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"encoder was 'clip@.*', now it is 'siglip@"):
        embed_texts(TextEncoder(models["siglip"]), path, tmp_path / "out", shard_rows=4, resume=True)
    with pytest.raises(ValueError, match="dtype was 'float32', now it is 'float16'"):
        embed_texts(text_encoder, path, tmp_path / "out", shard_rows=4, dtype="float16", resume=True)
    path.write_text("\n".join(captions(7)) + "\nblue")
    with pytest.raises(ValueError, match=r"the input a.txt\[0:4\] has changed; pass overwrite"):
        embed_texts(text_encoder, path, tmp_path / "out", shard_rows=4, resume=True)
    assert contents(tmp_path / "out") == before
    summary = embed_texts(text_encoder, path, tmp_path / "out", shard_rows=8, overwrite=True)
    assert (summary["files"], verify(tmp_path / "out")["ok"]) == (1, True)  # the second shard has gone

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        picture(number).save(folder / f"{number}.png")
    embed_images(image_encoder, folder, tmp_path / "pixels", shard_rows=2)
    picture(9).save(folder / "3.png")
    with pytest.raises(ValueError, match=r"the input images\[2:4\] has changed"):
        embed_images(image_encoder, folder, tmp_path / "pixels", shard_rows=2, resume=True)


def test_texts_that_change_meanwhile_are_refused(text_encoder, tmp_path, monkeypatch):
    path = write_texts(tmp_path / "a.txt", list(range(8)), captions(8))
    inner = text_encoder.features

    def changing(inputs: dict) -> "torch.Tensor":
        path.write_text(path.read_text() + "red\n")
        return inner(inputs)

    monkeypatch.setattr(text_encoder, "features", changing)
    with pytest.raises(ValueError, match=r"a.txt\[0:8\] has changed since the job began"):
        embed_texts(text_encoder, path, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".realign-journal"]


def test_a_full_disk_is_known_before_anything_is_written(text_encoder, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"not enough space: about 4,000 bytes are needed, 1,000 are free"):
        embed_texts(text_encoder, texts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- from raw files to aligned ones ---------------------------------------------------------------------------------


def test_the_whole_path(models, texts, images, tmp_path, realign):
    text, image, aligned = (tmp_path / name for name in ("text", "image", "aligned"))
    model = ("--model", models["clip"])
    code, summary, _ = realign("embed", *model, "--texts", texts, "-o", text, "--shard-rows", 20, "--dtype", "float16")
    assert (code, summary["command"], summary["rows"], summary["dim"]) == (0, "embed", 50, DIM)
    assert realign("embed", *model, "--images", images, "-o", image, "--dtype", "float16")[0] == 0
    assert realign("fit", text, image, "-o", tmp_path / "a.safetensors")[0] == 0
    encoder = rf.Alignment.load(tmp_path / "a.safetensors").encoder
    assert encoder == summary["encoder"]
    assert encoder.startswith("clip@")
    assert realign("inspect", tmp_path / "a.safetensors")[1]["encoder"] == encoder
    assert realign("apply", tmp_path / "a.safetensors", text, "-o", aligned)[0] == 0
    for folder in (text, image, aligned):
        assert realign("verify", folder)[1]["ok"]
    assert rf.fit(sorted(text.glob("*.npy")), image).encoder == encoder
    assert rf.fit(text, image, encoder="another").encoder == "another"
    assert rf.fit(text, rows_of(image)).encoder == encoder

    sidecars = sorted(text.glob(f"*{SIDECAR}.parquet"))
    dataset = EmbeddingDataset(aligned, ids=sidecars, index=tmp_path / "index")
    (row,) = dataset.numbers_of([31])
    assert torch.equal(dataset[row]["embedding"], torch.from_numpy(rows_of(aligned)[31]))

    code, summary, _ = realign("embed", "--model", models["siglip"], "--images", images, "-o", tmp_path / "other")
    with pytest.raises(ValueError, match=f"one encoder, got text .*{encoder}', image .*{summary['encoder']}'"):
        rf.fit(text, tmp_path / "other")


def test_the_command_names_what_is_wrong(models, tmp_path, realign):
    path = tmp_path / "a.txt"
    path.write_text("red\n\nblue\n")
    job = ("embed", "--model", models["clip"], "--texts", path, "-o", tmp_path / "out")
    assert realign(*job) == (
        1,
        None,
        f"realign embed: {path}: row 1: it has no text (on_bad_rows='skip' leaves such out)",
    )
    code, summary, line = realign(*job, "--overwrite", "--on-bad-rows", "skip")
    assert (code, summary["rows"], line) == (0, 2, f"realign embed: left out {path}: row 1: it has no text")
    code, _, line = realign("embed", "--model", tmp_path / "none", "--texts", path, "-o", tmp_path / "out")
    assert code == 1
    assert line.startswith("realign embed: ")
    for wrong in (("--texts", path, "--images", tmp_path), ()):
        with pytest.raises(SystemExit) as end:
            realign("embed", "--model", models["clip"], *wrong, "-o", tmp_path / "out")
        assert end.value.code == 2

"""Records joined with embeddings, chats whose labels are what the assistant says, and batches of both."""

import json
import os
import pickle
import tracemalloc
import warnings
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import realign_fast as rf
from realign_fast.data import DriftWarning, EmbeddingDataset
from realign_fast.io import _json
from realign_fast.io._json import JsonObjects
from realign_fast.revision._chat import encode_chat, messages_of
from realign_fast.revision.data import (
    IMAGE_TOKEN,
    PLAIN_TEMPLATE,
    Records,
    ReVisionCollator,
    ReVisionDataset,
    add_image_token,
)

DIM = 8
WORDS = ["a", "red", "blue", "green", "big", "cube", "ball", "left", "above", "the", "what", "is", "this", "two", "yes"]
SPECIAL = ["<s>", "</s>", "<|head|>", "<|end|>", "<|turn|>", "<|stop|>"]
ROLES = ["user", "assistant", "system", "USER", "ASSISTANT", ":"]

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|stop|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|end|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }} {% elif m['role'] == 'user' %}"
    "USER: {{ m['content'] }} {% else %}ASSISTANT: {{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{%- generation -%}"
    "{{ m['content'] }}<|stop|>{%- endgeneration -%}{% else %}{{ m['content'] }}<|stop|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
ENDS = {LLAMA: "<|stop|>", CHATML: "<|stop|>", VICUNA: "</s>", MARKED: "<|stop|>", PLAIN_TEMPLATE: "</s>"}


def make_tokenizer(kind="words", template=CHATML, **tokens):
    if kind == "words":
        names = ["<unk>", *SPECIAL, *ROLES, *WORDS]
        base = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<unk>"))
        base.pre_tokenizer = pre_tokenizers.Whitespace()
    else:  # whose tokens reach over the borders of words
        base = Tokenizer(models.BPE())
        base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        base.decoder = decoders.ByteLevel()
        corpus = [" ".join(WORDS), "user\nassistant\nASSISTANT: yes no USER: the red ball is left of it"] * 9
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        base.train_from_iterator(
            corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL)
        )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"} | tokens
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, clean_up_tokenization_spaces=False, **tokens)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.chat_template = template
    add_image_token(tokenizer)
    return tokenizer


def make(count, dim=DIM, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(0.3, 1, (count, dim)).astype(dtype)


def record_of(number, name=None):
    answer = " ".join(WORDS[(number * 7 + k) % len(WORDS)] for k in range(1 + number % 5))
    turns = [{"from": "human", "value": "<image>\nwhat is this"}, {"from": "gpt", "value": answer}]
    return {"id": f"é{number}" if name is None else name, "conversations": turns}


def write(path, records, lines=False):
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alignment():
    return rf.fit(make(300, seed=1), make(300, seed=2) - 0.5)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return 40 embeddings under the ids é39 ... é0."""
    folder = tmp_path_factory.mktemp("store")
    np.save(folder / "rows.npy", make(40, seed=3))
    parquet.write_table(pa.table({"id": [f"é{n}" for n in reversed(range(40))]}), folder / "ids.parquet")
    return EmbeddingDataset(folder / "rows.npy", ids=folder / "ids.parquet", index=folder / "index")


@pytest.fixture
def records(tmp_path, store):
    return Records(write(tmp_path / "records.json", [record_of(n) for n in range(24)]), embeddings=store)


# -- records

texts = st.text(max_size=12)
values = st.recursive(st.none() | st.integers() | texts, lambda inner: st.lists(inner, max_size=3), max_leaves=4)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.dictionaries(texts, values, max_size=4), max_size=6), min_size=1, max_size=3),
    st.sampled_from(["array", "indented", "lines", "spaced lines"]),
    st.booleans(),
    st.integers(1, 50),
)
def test_objects_lie_where_they_were_found(tmp_path_factory, files, form, ascii_only, chunk):
    folder = tmp_path_factory.mktemp("json")
    for number, items in enumerate(files):
        parts = [json.dumps(each, ensure_ascii=ascii_only, indent=2 if form == "indented" else None) for each in items]
        text = " \r\n[" + " ,\n".join(parts) + "]\n\n" if form in ("array", "indented") else "\n".join(parts)
        text = "\ufeff" + text.replace("\n", "\r\n \n") if form == "spaced lines" else text
        (folder / f"{number}.json").write_bytes(text.encode("utf-8", "surrogatepass" if ascii_only else "strict"))
    objects = JsonObjects(sorted(folder.iterdir()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_json, "_CHUNK", chunk)
        expected = [each for items in files for each in items]
        assert list(objects.scan()) == expected
    again = pickle.loads(pickle.dumps(objects))
    assert [again[n] for n in range(len(again))] == expected
    names = [f"{n}.json record {k} at" for n, items in enumerate(files) for k in range(len(items))]
    assert all(name in again.place(n) for n, name in enumerate(names))


@pytest.mark.parametrize("lines", [False, True])
def test_little_of_a_file_is_in_memory(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(_json, "_CHUNK", 1 << 14)
    filler = "x" * 20_000
    path = write(tmp_path / "a.json", [{**record_of(n), "more": filler} for n in range(400)], lines)
    tracemalloc.start()
    found = Records(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 400
    assert peak < path.stat().st_size / 10
    assert found[377]["conversations"] == record_of(377)["conversations"]


GOOD = '{"caption": "red"}'


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (f"[{GOOD}, {GOOD}", r"record 2 at byte 39: expected ',' or '\]'"),
        (f"[{GOOD}, {GOOD[:10]}", "record 1 at byte 21: damaged or cut short"),
        (f"{GOOD}\n{GOOD[:10]}", "record 1 at byte 19: damaged or cut short"),
        (f"[{GOOD} {GOOD}]", "record 1 at byte 20: expected ','"),
        (f"[{GOOD},]", r"record 1 at byte 20: expected an object, got '\]'"),
        (f"[{GOOD}] {GOOD}", "record 1 at byte 21: expected nothing behind the array"),
        (f"[{GOOD}, 5]", "record 1 at byte 21: expected an object, got '5'"),
        (f"{GOOD}\n[1]", r"record 1 at byte 19: expected an object, got '\['"),
        ('[{"id": tru}]', "record 0 at byte 1: damaged or cut short: Expecting value"),
        ('{"id": ' + "9" * 5000 + "}", "record 0 at byte 0: damaged or cut short: Exceeds the limit"),
        ('{"id": ' + "[" * 100_000 + "]" * 100_000 + "}", "record 0 at byte 0: nested too deep"),
        (f"{GOOD}\n".encode() + b'{"id": "\xff"}', "record 0 at byte 0: what follows is no UTF-8"),
        ("", "hold no record to use"),
        ("[]", "hold no record to use"),
    ],
)
def test_damage_is_located(tmp_path, content, problem):
    path = tmp_path / "damaged.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"damaged\.json.* {problem}"):
        Records(path, on_bad_records="skip")


def test_damage_does_not_bring_the_rest_of_a_file_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(_json, "_CHUNK", 1 << 10)
    monkeypatch.setattr(_json, "_MAX_OBJECT", 1 << 14)
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, \n' + f"{GOOD}\n" * 10_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.jsonl record 0 at byte 0: damaged or cut short: Expecting property name"):
        Records(path)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


def test_a_file_that_changes_is_found_out(tmp_path):
    path = write(tmp_path / "a.jsonl", [record_of(n) for n in range(3)], lines=True)
    found = Records(path)
    path.write_text(path.read_text().replace("cube", "ball") + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl has changed"):
        found[1]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        found[1]
    with pytest.raises(FileNotFoundError):
        Records(path)
    with pytest.raises(FileNotFoundError, match="matches no files"):
        Records(str(tmp_path / "*.json"))
    with pytest.raises(IndexError):
        found[3]


def test_records_are_joined_by_id(tmp_path, store):
    write(tmp_path / "a_2.json", [record_of(n) for n in range(5)])
    write(tmp_path / "a_10.json", [record_of(n) for n in (7, 5, 5)], lines=True)
    found = pickle.loads(pickle.dumps(Records(str(tmp_path / "a_*.json"), embeddings=store)))
    assert [each["id"] for each in found] == ["é0", "é1", "é2", "é3", "é4", "é7", "é5", "é5"]
    assert [store[int(row)]["id"] for row in found.rows] == [each["id"] for each in found]
    assert found.place(6).startswith(f"{tmp_path}/a_10.json record 1 at byte ")
    assert found.skipped == {}


def test_integer_ids_are_joined_whichever_side_writes_them_as_text(tmp_path):
    np.save(tmp_path / "rows.npy", make(3))
    parquet.write_table(pa.table({"key": [30, -4, 5]}), tmp_path / "ids.parquet")
    store = EmbeddingDataset(
        tmp_path / "rows.npy", ids=tmp_path / "ids.parquet", id_column="key", index=tmp_path / "index"
    )
    assert store.locate(["5", "x", "", -4, "0030"]).tolist() == [2, -1, -1, 1, 0]
    names = ["30", -4, "000005", "image 5", None, 5.5]
    path = write(tmp_path / "a.json", [{**record_of(0), "id": name} for name in names])
    found = Records(path, embeddings=store, on_bad_records="skip")
    assert found.rows.tolist() == [0, 1, 2]
    assert {reason: each["count"] for reason, each in found.skipped.items()} == {
        "no embedding of its id": 1,
        "no id": 2,
    }


def bad_records():
    human, gpt = record_of(0)["conversations"]
    shown = {**human, "value": "<image> <image>"}
    return {
        "no embedding of its id": [record_of(n, f"missing {n}") for n in range(7)],
        "no id": [{"conversations": [human, gpt]}],
        "got 0 and 0": [{"id": "é0", "conversations": [{**human, "value": "hm"}, gpt]}],
        "got 2 and 0": [{"id": "é0", "conversations": [shown, gpt]}],
        "expected one <image> and none in an answer, got 1 and 1": [
            {"id": "é0", "conversations": [{**human, "value": "hm"}, {**gpt, "value": "<image>"}]}
        ],
        "no answer": [{"id": "é0", "conversations": [human]}],
        "neither a caption nor conversations": [
            {"id": "é0"},
            {"id": "é0", "caption": 5},
            {"id": "é0", "conversations": "text"},
            {"id": "é0", "conversations": [human, {**gpt, "from": "bird"}]},
            {"id": "é0", "conversations": [human, {**gpt, "value": None}]},
        ],
        "surrogates not allowed": [{"id": "é0", "caption": "\ud800"}],
    }


def test_bad_records_are_skipped_counted_and_named(tmp_path, store):
    bad = bad_records()
    path = write(tmp_path / "a.jsonl", [record_of(1), *chain.from_iterable(bad.values()), record_of(2)], lines=True)
    found = Records(path, embeddings=store, on_bad_records="skip")
    assert [each["id"] for each in found] == ["é1", "é2"]
    assert found.rows.tolist() == [38, 37]
    assert len(found.skipped) == len(bad)
    for reason, entry in found.skipped.items():
        (expected,) = (each for name, each in bad.items() if name in reason)
        assert (entry["count"], len(entry["first"])) == (len(expected), min(5, len(expected)))
    named = found.skipped["no embedding of its id"]["first"][1]
    assert named.startswith(f"{path} record 2 at byte ")
    assert named.endswith("(id 'missing 1')")
    json.dumps(found.skipped)


@pytest.mark.parametrize("reason", bad_records())
def test_bad_records_are_refused(tmp_path, store, reason):
    path = write(tmp_path / "a.jsonl", [record_of(1), bad_records()[reason][0]], lines=True)
    with pytest.raises(ValueError, match=rf"a\.jsonl record 1 at byte \d+ \(id .*\): .*{reason}"):
        Records(path, embeddings=store)


def test_arguments_of_records_are_checked(tmp_path, store):
    path = write(tmp_path / "a.json", [record_of(1)])
    with pytest.raises(ValueError, match="on_bad_records must be"):
        Records(path, on_bad_records="zero")
    with pytest.raises(ValueError, match="with an index alone"):
        Records(path, embeddings=EmbeddingDataset(write_rows(tmp_path)))


def write_rows(folder):
    np.save(folder / "plain.npy", make(4))
    return folder / "plain.npy"


# -- chats

words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)


@st.composite
def chats(draw):
    system = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    turns = draw(st.lists(st.tuples(words, words), min_size=1, max_size=4))
    shown = draw(st.integers(0, len(turns) - 1))
    for number, (asked, answer) in enumerate(turns):
        asked = f"{IMAGE_TOKEN}\n{asked}" if number == shown else asked
        system += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return system


def learnt(tokenizer, ids, labels):
    """Return the text of each run of tokens that are to be learnt."""
    runs, before = [], False
    for token, label in zip(ids, labels, strict=True):
        assert label in (token, -100)
        if label != -100:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = label != -100
    return [tokenizer.decode(run) for run in runs]


TOKENIZERS = {kind: make_tokenizer(kind) for kind in ("words", "bytes")}


@pytest.mark.parametrize("kind", ["words", "bytes"])
@pytest.mark.parametrize("template", [LLAMA, CHATML, VICUNA, MARKED, PLAIN_TEMPLATE])
@settings(max_examples=12, deadline=None)
@given(chat=chats())
def test_what_is_learnt_is_what_the_assistant_says(template, kind, chat):
    tokenizer = TOKENIZERS[kind]
    tokenizer.chat_template = template
    ids, labels = encode_chat(tokenizer, chat)
    answers = [message["content"] + ENDS[template] for message in chat if message["role"] == "assistant"]
    found = [text.replace(" <", "<") for text in learnt(tokenizer, ids, labels)]
    if kind == "bytes" and template == VICUNA:  # " yes" is one token, with the space that belongs to no word
        found = [text.removeprefix(" ") for text in found]
    assert found == answers
    assert ids == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]


@pytest.mark.parametrize("kind", ["words", "bytes"])
@settings(max_examples=12, deadline=None)
@given(chat=chats())
def test_markers_and_prefixes_agree(kind, chat):
    tokenizer, found = TOKENIZERS[kind], []
    for template in (MARKED, CHATML):
        tokenizer.chat_template = template
        found.append(encode_chat(tokenizer, chat))
    assert found[0] == found[1]


def test_a_token_that_reaches_into_an_answer_is_learnt():
    template = VICUNA.replace("{% if add_generation_prompt %}ASSISTANT:", "{% if add_generation_prompt %}ASSISTANT: ")
    tokenizer = make_tokenizer("bytes", template)
    chat = messages_of({"caption": "the red ball"})
    ids, labels = encode_chat(tokenizer, chat)
    text = "".join(learnt(tokenizer, ids, labels))
    assert text.endswith("the red ball</s>")
    assert any(tokenizer.decode([token]).startswith(" the") for token in ids)


def test_white_space_is_learnt_where_nothing_else_ends_a_turn():
    lines = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    lines += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = make_tokenizer("bytes", lines)
    assert learnt(tokenizer, *encode_chat(tokenizer, messages_of({"caption": "red"}))) == [" red\n"]


def test_records_become_messages():
    turns = [
        {"from": "system", "value": "s"},
        {"from": "user", "value": "<image>"},
        {"from": "assistant", "value": "b"},
    ]
    roles = [message["role"] for message in messages_of({"conversations": turns, "caption": "c"})]
    assert roles == ["system", "user", "assistant"]
    assert messages_of({"caption": "c"}, "what?")[0] == {"role": "user", "content": "<image>\nwhat?"}
    assert messages_of({"caption": "c", "conversations": None})[1] == {"role": "assistant", "content": "c"}


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "no chat template: set its chat_template, for instance to PLAIN_TEMPLATE"),
        (CHATML.split("{% if add")[0], "does not tell where the answer 'a' begins: mark the answers"),
        (CHATML + "{% if not add_generation_prompt %}</s>{% endif %}{{ messages | length }}", "changes what it says"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] | replace('<image>', '') }}"), "makes 0 <image> tokens"),
        ("{{ raise_exception('roles must alternate') }}", "refuses|roles must alternate"),
    ],
)
def test_templates_that_tell_nothing_are_refused(tmp_path, template, problem):
    found = Records(write(tmp_path / "a.json", [record_of(0)]))
    with pytest.raises(ValueError, match=problem):
        ReVisionDataset(found, make_tokenizer(template=template))


def test_the_image_token_is_added_once(tmp_path):
    tokenizer = make_tokenizer()
    token, size = add_image_token(tokenizer), len(tokenizer)
    assert add_image_token(tokenizer) == token == size - 1
    assert tokenizer("red<image>ball").input_ids[1] == token
    tokenizer.save_pretrained(tmp_path)
    assert add_image_token(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == token


# -- samples and batches


def test_samples_hold_tokens_and_embeddings(records, store):
    tokenizer = make_tokenizer()
    data = ReVisionDataset(records, tokenizer)
    assert len(data) == 24
    samples = data.__getitems__([5, 2])
    assert [sample["id"] for sample in samples] == ["é5", "é2"]
    for sample in (*samples, data[7]):
        assert torch.equal(sample["embedding"], store[sample["id"]]["embedding"])
        assert sample["input_ids"].count(add_image_token(tokenizer)) == 1
        assert (sample["epoch"], store[sample["row"]]["id"]) == (0, sample["id"])
    data.set_epoch(3)
    assert data[0]["epoch"] == 3


def test_batches_are_padded(records):
    tokenizer = make_tokenizer()
    image = add_image_token(tokenizer)
    samples = ReVisionDataset(records, tokenizer).__getitems__(range(6))
    batch = ReVisionCollator(tokenizer, num_visual_tokens=3)(samples)
    assert set(batch) == {"input_ids", "labels", "embeddings", "attention_mask"}
    for n, sample in enumerate(samples):
        count = len(sample["input_ids"]) + 2
        at = sample["input_ids"].index(image)
        ids = batch["input_ids"][n].tolist()
        assert ids[at : at + 3] == [image] * 3
        assert ids[:at] + ids[at + 2 : count] == sample["input_ids"]
        labels = batch["labels"][n].tolist()
        assert labels[at : at + 3] == [-100] * 3
        assert labels[:at] + labels[at + 2 : count] == sample["labels"]
        assert batch["attention_mask"][n].tolist() == [1] * count + [0] * (len(ids) - count)
        assert set(ids[count:]) <= {tokenizer.pad_token_id}
        assert set(labels[count:]) <= {-100}
        assert torch.equal(batch["embeddings"][n], sample["embedding"])


def test_embeddings_are_aligned_by_the_same_kernel(records, alignment):
    tokenizer = make_tokenizer()
    samples = ReVisionDataset(records, tokenizer).__getitems__(range(9))
    raw = torch.stack([sample["embedding"] for sample in samples])
    for side in ("source", "target"):
        batch = ReVisionCollator(tokenizer, alignment, side=side)(samples)
        assert torch.equal(batch["embeddings"], alignment.transform(raw, side=side))
    half = ReVisionCollator(tokenizer, alignment, dtype=torch.bfloat16)(samples)["embeddings"]
    assert torch.equal(half, alignment.transform(raw, dtype="bfloat16"))
    assert ReVisionCollator(tokenizer, dtype=torch.float16)(samples)["embeddings"].dtype == torch.float16


def test_noise_depends_on_seed_epoch_and_row_alone(records, alignment):
    tokenizer = make_tokenizer()
    data = ReVisionDataset(records, tokenizer)

    def noisy(numbers, seed=0, epoch=0, std=0.1):
        data.set_epoch(epoch)
        collate = ReVisionCollator(tokenizer, alignment, noise_std=std, seed=seed)
        return collate(data.__getitems__(numbers))["embeddings"]

    first = noisy(range(12))
    order = [7, 3, 11]
    assert torch.equal(noisy(order), first[order])
    assert torch.equal(noisy(range(12)), first)
    plain = noisy(range(12), std=0.0)
    for other in (noisy(range(12), epoch=1), noisy(range(12), seed=1), plain):
        assert (other - first).norm(dim=1).min() > 0.02
    torch.testing.assert_close(first.norm(dim=1), torch.ones(12))
    # 12 x 8 numbers of standard deviation 0.1, nearly all of which stays after the projection
    assert 0.05 < float((first - plain).std()) < 0.15


@pytest.mark.parametrize("method", ["anchor", "anchor_trace", "coral", "c3"])
def test_noise_is_an_option_of_every_map(records, method):
    options = {"noise_std": 0.016} if method == "c3" else {}
    alignment = rf.fit(make(300, seed=1), make(300, seed=2), method=method)
    del options
    tokenizer = make_tokenizer()
    samples = ReVisionDataset(records, tokenizer).__getitems__(range(4))
    one, other = (ReVisionCollator(tokenizer, alignment, noise_std=std)(samples)["embeddings"] for std in (0.0, 0.05))
    assert (one - other).norm(dim=1).min() > 0.01


def test_patches_take_a_place_each(records, alignment):
    tokenizer = make_tokenizer()
    image = add_image_token(tokenizer)
    samples = ReVisionDataset(records, tokenizer).__getitems__(range(3))
    patches = torch.from_numpy(make(15, seed=4)).view(3, 5, DIM)
    samples = [{**sample, "embedding": each} for sample, each in zip(samples, patches, strict=True)]
    batch = ReVisionCollator(tokenizer, alignment, num_visual_tokens=2, noise_std=0.1)(samples)
    assert batch["embeddings"].shape == (3, 5, DIM)
    assert (batch["input_ids"] == image).sum(dim=1).tolist() == [5, 5, 5]
    alone = ReVisionCollator(tokenizer, alignment, noise_std=0.1)(samples[1:2])["embeddings"]
    assert torch.equal(alone[0], batch["embeddings"][1])
    same = [{**samples[0], "embedding": patches[:1, :1].expand(1, 5, DIM)[0]}]
    noisy = ReVisionCollator(tokenizer, alignment, noise_std=0.1)(same)["embeddings"][0]
    assert len({tuple(row) for row in noisy.tolist()}) == 5  # each patch has noise of its own


class Encoder:
    name = "tiny"

    def __init__(self, dim=DIM):
        self.weight = torch.nn.Parameter(torch.randn(97, dim, generator=torch.Generator().manual_seed(0)))
        self.calls = []

    def __call__(self, texts):
        self.calls.append(texts)
        return torch.stack([self.weight[[ord(letter) % 97 for letter in text]].sum(0) for text in texts])


def test_text_is_encoded_on_the_fly(tmp_path, alignment):
    tokenizer, encoder = make_tokenizer(), Encoder()
    items = [record_of(0), {**record_of(1), "caption": "a big cube"}, {"caption": "two ball"}]
    data = ReVisionDataset(Records(write(tmp_path / "a.json", items)), tokenizer, prompt="what is this")
    samples = data.__getitems__([2, 0, 1])
    assert [sample["text"] for sample in samples] == ["two ball", "a", "a big cube"]
    assert [sample["id"] for sample in samples] == [2, "é0", "é1"]
    assert "what is this" in tokenizer.decode(samples[0]["input_ids"])
    batch = ReVisionCollator(tokenizer, alignment, encoder=encoder, noise_std=0.1)(samples)
    assert encoder.calls == [["two ball", "a", "a big cube"]]  # as one batch
    assert not batch["embeddings"].requires_grad
    again = ReVisionCollator(tokenizer, alignment, encoder=encoder, noise_std=0.1)(samples[2:])
    torch.testing.assert_close(again["embeddings"][0], batch["embeddings"][2])
    arrays = ReVisionCollator(tokenizer, encoder=lambda texts: make(len(texts), 5))(samples)
    assert arrays["embeddings"].shape == (3, 5)
    with pytest.raises(ValueError, match="pass encoder="):
        ReVisionCollator(tokenizer)(samples)
    with pytest.raises(ValueError, match=r"a row for each of 3 texts, got \(1, 5\)"):
        ReVisionCollator(tokenizer, encoder=lambda texts: make(1, 5))(samples)


def test_another_encoder_than_that_of_the_fit_is_refused_or_warned_of(tmp_path):
    fitted = rf.fit(make(300, seed=1), make(300, seed=2), encoder="large")
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="fitted on 'large', the encoder is 'tiny'"):
        ReVisionCollator(tokenizer, fitted, encoder=Encoder())
    ReVisionCollator(tokenizer, rf.fit(make(300, seed=1), make(300, seed=2)), encoder=Encoder())

    samples = ReVisionDataset(Records(write(tmp_path / "a.json", [record_of(0)])), tokenizer).__getitems__([0]) * 32
    rng = np.random.default_rng(0)
    for shift, warned in ((0.3, 0), (-0.3, 1)):
        collate = ReVisionCollator(
            tokenizer,
            fitted,
            encoder=lambda texts, shift=shift: rng.normal(shift, 1, (len(texts), DIM)),
            check_drift=300,
        )
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(20):
                collate(samples)
        assert [each.category for each in found] == [DriftWarning] * warned
    images = ReVisionCollator(tokenizer, fitted, side="target", check_drift=32)
    images([{**sample, "embedding": torch.full((DIM,), -1.0)} for sample in samples])


def test_length_counts_visual_tokens(records):
    tokenizer = make_tokenizer()
    data = ReVisionDataset(records, tokenizer)
    short, long = data[0], data[4]
    at = short["input_ids"].index(add_image_token(tokenizer))
    first = next(n for n, label in enumerate(short["labels"]) if label != -100)
    for count in (1, 4):
        full = len(short["input_ids"]) + count - 1
        collate = ReVisionCollator(tokenizer, num_visual_tokens=count, max_length=full)
        batch = collate([short, long])
        assert batch["input_ids"].shape == (2, full)
        collate = ReVisionCollator(tokenizer, num_visual_tokens=count, max_length=first + count - 1)
        with pytest.raises(ValueError, match=r"no label .*=\d+ of the records \['é0', 'é4'\], the whole batch"):
            collate([short, long])
        collate = ReVisionCollator(tokenizer, num_visual_tokens=count, max_length=at + count - 1)
        with pytest.raises(ValueError, match="no label or no image"):
            collate([short])


def test_samples_without_labels_are_left_out(records):
    tokenizer = make_tokenizer()
    samples = ReVisionDataset(records, tokenizer).__getitems__(range(4))
    samples[1] = {**samples[1], "labels": [-100] * len(samples[1]["labels"])}
    collate = ReVisionCollator(tokenizer)
    with pytest.warns(UserWarning, match=r"of the records \['é1'\]"):
        batch = collate(samples)
    kept = [samples[n] for n in (0, 2, 3)]
    assert torch.equal(batch["embeddings"], torch.stack([sample["embedding"] for sample in kept]))
    assert {name: values.shape for name, values in batch.items()} == {
        name: values.shape for name, values in collate(kept).items()
    }
    collate(samples)  # and says so once
    with pytest.raises(ValueError, match=r"\['é1', 'é1'\], the whole batch"):
        collate([samples[1]] * 2)


def test_the_end_of_text_pads_where_nothing_else_does(records):
    tokenizer = make_tokenizer(pad_token=None)
    samples = ReVisionDataset(records, tokenizer).__getitems__([0, 4])
    batch = ReVisionCollator(tokenizer)(samples)
    padding = batch["input_ids"][batch["attention_mask"] == 0]
    assert len(padding)
    assert set(padding.tolist()) == {tokenizer.eos_token_id}
    with pytest.raises(ValueError, match="neither a pad nor an eos token"):
        ReVisionCollator(make_tokenizer(pad_token=None, eos_token=None))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"noise_std": 0.1}, "noise_std needs an alignment"),
        ({"noise_std": 0.1, "side": "target", "aligned": True}, "noise_std needs an alignment and side='source'"),
        ({"packing": True}, "packing needs it, got None"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"dim": 9, "aligned": True}, "alignment has dimension 8, the model takes embeddings of 9"),
    ],
)
def test_arguments_of_the_collator_are_checked(alignment, options, problem):
    fitted = alignment if options.pop("aligned", False) else None
    with pytest.raises(ValueError, match=problem):
        ReVisionCollator(make_tokenizer(), fitted, **options)


def test_embeddings_of_another_dimension_are_refused(records, alignment):
    tokenizer = make_tokenizer()
    samples = ReVisionDataset(records, tokenizer).__getitems__([0, 1])
    with pytest.raises(ValueError, match="embeddings have dimension 8, the model takes 9"):
        ReVisionCollator(tokenizer, dim=9)(samples)
    other = [{**sample, "embedding": sample["embedding"][:5]} for sample in samples]
    with pytest.raises(ValueError, match="dimension 8, got shape"):
        ReVisionCollator(tokenizer, alignment)(other)


# -- packing


def test_packed_rows_are_full_and_in_order(records, alignment):
    tokenizer = make_tokenizer()
    image = add_image_token(tokenizer)
    samples = ReVisionDataset(records, tokenizer).__getitems__(range(20))
    lengths = [len(sample["input_ids"]) + 1 for sample in samples]
    limit = 3 * max(lengths) + 1
    packed = ReVisionCollator(tokenizer, alignment, num_visual_tokens=2, max_length=limit, packing=True)(samples)
    plain = ReVisionCollator(tokenizer, alignment, num_visual_tokens=2)(samples)
    assert set(packed) == {"input_ids", "labels", "embeddings", "position_ids"}
    rows, width = packed["input_ids"].shape
    assert width <= limit
    # First-fit decreasing needs at most 11/9 of the best and 6/9 of a row more; the best is no better than the sum.
    assert rows <= 11 / 9 * -(-sum(lengths) // limit) + 1
    found = []
    for ids, labels, positions in zip(*(packed[name] for name in ("input_ids", "labels", "position_ids")), strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), width]
        for begin, end in pairwise(starts):
            assert positions[begin:end].tolist() == list(range(end - begin))
            if image in ids[begin:end]:
                found.append((ids[begin:end].tolist(), labels[begin:end].tolist()))
            else:
                assert set(labels[begin:end].tolist()) == {-100}
    assert len(found) == 20
    for (ids, labels), embedding in zip(found, packed["embeddings"], strict=True):
        number = next(n for n in range(20) if torch.equal(plain["embeddings"][n], embedding))
        count = int(plain["attention_mask"][number].sum())
        assert ids == plain["input_ids"][number, :count].tolist()
        assert labels == plain["labels"][number, :count].tolist()


def test_packed_samples_do_not_see_each_other(records):
    tokenizer = make_tokenizer()
    samples = ReVisionDataset(records, tokenizer).__getitems__(range(8))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=add_image_token(tokenizer) + 1,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    ).eval()
    losses = []
    for options in ({}, {"packing": True, "max_length": 50}):
        batch = ReVisionCollator(tokenizer, **options)(samples)
        del batch["embeddings"]
        with torch.no_grad():
            losses.append(model(**batch, use_cache=False).loss)  # a cache would be of one sequence
    torch.testing.assert_close(losses[0], losses[1])


# -- workers


def batches(data, collate, workers, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = DataLoader(data, 5, collate_fn=collate, num_workers=workers, **options)
    return loader


@pytest.mark.parametrize("packing", [False, True])
def test_workers_make_the_same_batches(records, alignment, packing):
    tokenizer = make_tokenizer()
    data = ReVisionDataset(records, tokenizer)
    collate = ReVisionCollator(tokenizer, alignment, noise_std=0.1, packing=packing, max_length=60)
    loader = batches(data, collate, 2, persistent_workers=True)
    seen = []
    for epoch in range(2):
        data.set_epoch(epoch)
        for ours, theirs in zip(batches(data, collate, 0), loader, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
            seen.append(ours["embeddings"])
    assert not torch.equal(seen[0], seen[5])


def test_what_workers_get_can_be_pickled(records, alignment):
    tokenizer = make_tokenizer()
    data = ReVisionDataset(records, tokenizer)
    collate = ReVisionCollator(tokenizer, alignment, noise_std=0.1)
    again, recollate = pickle.loads(pickle.dumps((data, collate)))
    ours, theirs = collate(data.__getitems__([3, 1])), recollate(again.__getitems__([3, 1]))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_spawned_worker_makes_the_same_batches(records, alignment):
    tokenizer = make_tokenizer()
    data = ReVisionDataset(records, tokenizer)
    data.set_epoch(4)
    collate = ReVisionCollator(tokenizer, alignment, noise_std=0.1)
    loader = batches(data, collate, 1, multiprocessing_context="spawn")
    for ours, theirs in zip(batches(data, collate, 0), loader, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_files_are_not_kept_open(records):
    before = len(os.listdir("/proc/self/fd"))
    list(records)
    assert len(os.listdir("/proc/self/fd")) == before

"""The model: any language model with a projector before it, as transformers, peft and LLaVA know one."""

import contextlib
import copy
import itertools
import pickle
import random
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)

from realign_fast.revision import ReVisionConfig, ReVisionForCausalLM, check_packing

VOCAB, HIDDEN, DIM, IMAGE, PAD = 20, 16, 12, 99, 0

CONFIGS = {
    "gpt2": lambda **options: GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=64, pad_token_id=PAD, bos_token_id=1,
        eos_token_id=2, **options,
    ),
    "llama": lambda **options: LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=PAD, **options,
    ),
    "qwen2": lambda **options: Qwen2Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=PAD, bos_token_id=1, eos_token_id=2, **options,
    ),
    "gpt_neox": lambda **options: GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=PAD, bos_token_id=1, eos_token_id=2, **options,
    ),
}  # fmt: skip


def language_model(kind="llama", attention="sdpa", **options):
    torch.manual_seed(0)
    # Wider than usual, so that logits of different inputs lie well apart.
    config = CONFIGS[kind](initializer_range=0.3, **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def make(kind="llama", attention="sdpa", *, lm=None, **options):
    lm = lm or language_model(kind, attention)
    return ReVisionForCausalLM.from_language_model(lm, **{"embedding_dim": DIM, "image_token_id": IMAGE, **options})


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(ids):
    return ids.masked_fill((ids == IMAGE) | (ids == PAD), -100)


BATCH = torch.tensor([[1, IMAGE, IMAGE, 5, 6, 7], [1, 4, IMAGE, IMAGE, 8, 3]])


@pytest.mark.parametrize("kind", CONFIGS)
class TestAnyLanguageModel:
    def test_visual_tokens_stand_at_their_placeholders(self, kind):
        model = make(kind, num_visual_tokens=2)
        lm, embeddings = model.language_model, rows(2, DIM)
        words = lm.get_input_embeddings()(BATCH.masked_fill(BATCH == IMAGE, 3))
        tokens = model.projector(embeddings).reshape(2, 2, HIDDEN)
        words[0, 1:3], words[1, 2:4] = tokens[0], tokens[1]
        expected = lm(inputs_embeds=words, labels=labels_of(BATCH))
        out = model(BATCH, embeddings, labels=labels_of(BATCH))
        assert torch.equal(out.logits, expected.logits)
        assert torch.equal(out.loss, expected.loss)
        assert type(out) is type(expected)

    def test_comes_back_from_disk_as_it_was(self, kind, tmp_path):
        model = make(kind, num_visual_tokens=2, projector_dim=10)
        model.generation_config.eos_token_id = [2, 7]
        model.generation_config.max_new_tokens = 5
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(again) is ReVisionForCausalLM
        assert type(again.language_model) is type(model.language_model)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
        assert again.generation_config.eos_token_id == [2, 7]
        assert type(AutoConfig.from_pretrained(tmp_path)) is ReVisionConfig
        embeddings = rows(2, DIM)
        assert torch.equal(again.generate(BATCH, embeddings), model.generate(BATCH, embeddings))

    def test_greedy_is_a_loop_over_forward(self, kind):
        model, embeddings = make(kind, num_visual_tokens=2), rows(2, DIM)
        ids = BATCH
        for _ in range(6):
            ids = torch.cat([ids, model(ids, embeddings).logits[:, -1:].argmax(-1)], dim=1)
        found = model.generate(BATCH, embeddings, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(found, ids[:, BATCH.shape[1] :])

    def test_padding_on_the_left_changes_nothing(self, kind):
        model, embeddings = make(kind), rows(3, DIM)
        prompts = [[1, IMAGE, 5], [1, IMAGE, 4, IMAGE, 6, 7]]
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        apart = torch.cat([
            model.generate(torch.tensor(prompts[:1]), embeddings[:1], **options),
            model.generate(torch.tensor(prompts[1:]), embeddings[1:], **options),
        ])  # fmt: skip
        ids = torch.tensor([[PAD] * 3 + prompts[0], prompts[1]])
        mask = torch.tensor([[0] * 3 + [1] * 3, [1] * 6])
        assert torch.equal(model.generate(ids, embeddings, mask, **options), apart)

    def test_checkpointing_changes_neither_loss_nor_gradients(self, kind):
        model, embeddings = make(kind), rows(4, DIM)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

        def step():
            model.zero_grad()
            loss = model(BATCH, embeddings, labels=labels_of(BATCH)).loss
            loss.backward()
            return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

        plain = step()
        enable_checkpointing(model)
        inner = count_calls(first_mlp(model))
        for one, other in zip(plain, step(), strict=True):
            torch.testing.assert_close(one, other)
        assert len(inner) == 2  # once forward, once more for the gradients

    def test_frozen_language_model_stays_in_eval_mode_and_as_it_is(self, kind):
        # Dropout everywhere: were a module in training mode, two passes would differ.
        lm = language_model(kind)
        for module in lm.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        model, embeddings = make(lm=lm), rows(4, DIM)
        model.freeze_language_model()
        before = copy.deepcopy(lm.state_dict())
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                enable_checkpointing(model)
            model.train()
            inner = count_calls(first_mlp(model))
            model.zero_grad()
            loss = model(BATCH, embeddings, labels=labels_of(BATCH)).loss
            loss.backward()
            assert len(inner) == 1 + checkpointing
            gradients.append([loss.detach(), *(parameter.grad.clone() for parameter in model.projector.parameters())])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
        assert all(parameter.grad is None for parameter in lm.parameters())
        assert model.projector.training
        assert not lm.training
        torch.optim.AdamW(model.parameters(), lr=0.1).step()
        assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())
        model.eval()
        assert not any(module.training for module in model.modules())


def first_mlp(model):
    return next(module for name, module in model.language_model.named_modules() if name.endswith("0.mlp"))


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def enable_checkpointing(model):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


class TestVisualTokens:
    def test_one_projection_is_576_tokens(self):
        one, all_of_them = make(num_visual_tokens=576), make()
        all_of_them.load_state_dict(one.state_dict())
        rows_seen = []
        one.projector[0].register_forward_hook(lambda _, inputs, __: rows_seen.append(len(inputs[0])))
        embeddings = rows(2, DIM)
        ids = torch.tensor([[1, *[IMAGE] * 576, 5], [1, *[IMAGE] * 576, 7]])
        expected = all_of_them.embed(ids, embeddings.repeat_interleave(576, dim=0))
        torch.testing.assert_close(one.embed(ids, embeddings), expected)
        assert rows_seen == [2]

    def test_gradients_are_those_of_576_projections(self):
        one, all_of_them = make(num_visual_tokens=576).double(), make().double()
        all_of_them.load_state_dict(one.state_dict())
        embeddings = rows(2, DIM).double()
        one.projector(embeddings).square().sum().backward()
        all_of_them.projector(embeddings.repeat_interleave(576, dim=0)).square().sum().backward()
        for ours, theirs in zip(one.projector.parameters(), all_of_them.projector.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)

    def test_several_tokens_are_repeated_in_order(self):
        model, embeddings = make(num_visual_tokens=6, num_projected_tokens=3), rows(2, DIM)
        first, _, last = model.projector
        assert last.out_features == 3 * HIDDEN
        tokens = last(nn.functional.gelu(first(embeddings))).reshape(2, 3, HIDDEN)
        expected = torch.stack([tokens, tokens], dim=1).reshape(12, HIDDEN)
        assert torch.equal(model.projector(embeddings), expected)

    @pytest.mark.parametrize("projector", ["mlp", "linear", "identity"])
    def test_each_patch_is_a_token(self, projector):
        model = make(projector=projector, num_visual_tokens=5, embedding_dim=HIDDEN)
        patches = rows(2, 3, HIDDEN)
        tokens = model.projector(patches)
        assert tokens.shape == (6, HIDDEN)
        for found, patch in zip(tokens, patches.reshape(6, HIDDEN), strict=True):
            torch.testing.assert_close(found, model.projector(patch[None])[0])
        ids = torch.tensor([[1, *[IMAGE] * 6, 5]])  # two images in one row
        assert torch.equal(model.embed(ids, patches)[0, 1:7], tokens)

    def test_linear_is_one_layer_and_identity_none(self):
        embeddings = rows(3, HIDDEN)
        linear = make(projector="linear", embedding_dim=HIDDEN).projector
        assert torch.equal(linear(embeddings), linear[0](embeddings))
        identity = make(projector="identity", embedding_dim=HIDDEN).projector
        assert torch.equal(identity(embeddings), embeddings)
        assert not list(identity.parameters())

    def test_text_alone_is_the_language_model(self):
        model = make().train()
        ids = BATCH.masked_fill(BATCH == IMAGE, 9)
        out = model(ids, labels=ids)
        assert torch.equal(out.logits, model.language_model(ids).logits)
        model.freeze_language_model()
        model(ids, labels=ids).loss.backward()  # of a rank or a step without images
        assert all(
            parameter.grad is not None and not parameter.grad.any() for parameter in model.projector.parameters()
        )

    def test_hidden_size_is_that_of_the_token_embeddings(self):
        config = OPTConfig(
            vocab_size=VOCAB, hidden_size=16, word_embed_proj_dim=8, num_hidden_layers=1, num_attention_heads=2,
            ffn_dim=16, max_position_embeddings=32,
        )  # fmt: skip
        model = make(lm=AutoModelForCausalLM.from_config(config))
        assert model(BATCH, rows(4, DIM)).logits.shape == (2, 6, VOCAB)


class TestBadInput:
    @pytest.mark.parametrize(
        ("ids", "shape", "message"),
        [
            (BATCH, (2, 8), r"embeddings must be \(n, 12\) or \(n, patches, 12\), got shape \(2, 8\)"),
            (BATCH, (12,), r"got shape \(12,\)"),
            (BATCH, (1, DIM), r"give 2 visual tokens, input_ids have 4 placeholders 99"),
            (BATCH, None, r"give 0 visual tokens, input_ids have 4 placeholders"),
            (BATCH, (1, 3, DIM), r"shape \(1, 3, 12\) give 3 visual tokens, input_ids have 4"),
            (BATCH.masked_fill(BATCH == IMAGE, 3), (2, DIM), r"give 4 visual tokens, input_ids have 0"),
        ],
    )
    def test_what_does_not_fit_is_named(self, ids, shape, message):
        model = make(num_visual_tokens=2)
        embeddings = None if shape is None else rows(*shape)
        with pytest.raises(ValueError, match=message):
            model(ids, embeddings)
        with pytest.raises(ValueError, match=message):
            model.generate(ids, embeddings, max_new_tokens=1)

    def test_ids_and_their_embeddings_at_once(self):
        model, words = make(), rows(1, 3, HIDDEN)
        for options in ({}, {"input_ids": BATCH, "inputs_embeds": words}, {"embeddings": rows(1, DIM)}):
            with pytest.raises(ValueError, match="forward takes either"):
                model(**options)
        with pytest.raises(ValueError, match="forward takes either"):
            model(embeddings=rows(1, DIM), inputs_embeds=words)
        assert torch.equal(model(inputs_embeds=words).logits, model.language_model(inputs_embeds=words).logits)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"projector": "mlp3x"}, "projector must be mlp, linear or identity, got 'mlp3x'"),
            ({"projector": "identity"}, "embedding_dim must be the hidden size 16, got 12"),
            ({"projector": "identity", "num_projected_tokens": 2, "num_visual_tokens": 2}, "be 1 for the identity"),
            ({"num_visual_tokens": 3, "num_projected_tokens": 2}, "must divide num_visual_tokens, 3, .* got 2 for mlp"),
            ({"num_visual_tokens": 0}, "at least 1.* num_visual_tokens 0 "),
            ({"embedding_dim": 0}, "at least 1.* embedding_dim 0"),
            ({"projector_dim": -1}, "at least 1.* projector_dim -1"),
            ({"image_token_id": -200}, "image_token_id -200"),
        ],
    )
    def test_configuration(self, options, message):
        with pytest.raises(ValueError, match=message):
            make(**options)

    def test_language_model_of_another_kind(self):
        with pytest.raises(TypeError, match="got Linear"):
            make(lm=nn.Linear(2, 2))
        with pytest.raises(TypeError, match="got LlamaForCausalLM and dtype"):
            make(dtype="bfloat16")


class TestTransformers:
    def test_language_model_comes_by_name_and_stays_as_it_is(self, tmp_path):
        lm = language_model(tie_word_embeddings=True)
        lm.generation_config.eos_token_id = [2, 5]
        lm.save_pretrained(tmp_path)
        options = {"embedding_dim": DIM, "image_token_id": IMAGE}
        by_name = ReVisionForCausalLM.from_language_model(tmp_path, **options, attn_implementation="eager")
        assert by_name.language_model.config._attn_implementation == "eager"
        assert by_name.generation_config.eos_token_id == [2, 5]
        for model in (by_name, ReVisionForCausalLM.from_language_model(lm, **options)):
            found = model.language_model.state_dict()
            assert all(torch.equal(tensor, found[name]) for name, tensor in lm.state_dict().items())

    def test_modules_put_into_it_stay_too(self):
        lm = language_model()
        lm.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        weight = lm.lm_head.weight.clone()
        assert torch.equal(make(lm=lm).get_output_embeddings().weight, weight)

    def test_tied_embeddings_stay_tied(self, tmp_path):
        model = make(lm=language_model(tie_word_embeddings=True))
        model.save_pretrained(tmp_path)
        assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        again = ReVisionForCausalLM.from_pretrained(tmp_path)
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
        again.resize_token_embeddings(VOCAB + 3)
        assert again.get_output_embeddings().weight.shape == (VOCAB + 3, HIDDEN)
        assert again.config.text_config.vocab_size == VOCAB + 3

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_attention_is_the_language_models(self, tmp_path, attention):
        make(attention=attention).save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
        assert again.language_model.model.layers[0].self_attn.config._attn_implementation == attention

    def test_bf16_with_a_float32_projector(self, tmp_path):
        whole = make(num_visual_tokens=2)
        model = make(lm=copy.deepcopy(whole.language_model).to(torch.bfloat16), num_visual_tokens=2)
        model.projector.load_state_dict(whole.projector.state_dict())
        assert model.dtype == torch.bfloat16
        embeddings = rows(2, DIM)
        out = model(BATCH, embeddings.to(torch.bfloat16), labels=labels_of(BATCH))
        # Three decimals of bfloat16 through two layers.
        torch.testing.assert_close(out.logits.float(), whole(BATCH, embeddings).logits, rtol=0.05, atol=0.1)
        out.loss.backward()
        assert {parameter.grad.dtype for parameter in model.projector.parameters()} == {torch.float32}
        model.save_pretrained(tmp_path)
        for dtype in ("auto", "float16"):
            again = ReVisionForCausalLM.from_pretrained(tmp_path, dtype=dtype)
            assert again.dtype == (torch.bfloat16 if dtype == "auto" else torch.float16)
            assert all(torch.equal(one, other) for one, other in pairs(again.projector, model.projector))

    def test_autocast(self):
        model, embeddings = make(), rows(4, DIM)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(BATCH, embeddings, labels=labels_of(BATCH)).loss
        torch.testing.assert_close(loss, model(BATCH, embeddings, labels=labels_of(BATCH)).loss, rtol=0.05, atol=0.05)

    def test_beams_wide_enough_find_the_best_continuation(self):
        model, embeddings = make(), rows(2, DIM)
        prompt = torch.tensor([[1, IMAGE, 5, IMAGE]])
        found = model.generate(
            prompt, embeddings, num_beams=VOCAB, max_new_tokens=2, do_sample=False, eos_token_id=None
        )
        both = torch.tensor(list(itertools.product(range(VOCAB), repeat=2)))
        ids = torch.cat([prompt.expand(len(both), -1), both], dim=1)
        scores = model(ids, embeddings.repeat(len(both), 1)).logits.log_softmax(-1)[:, 3:5]
        best = scores.gather(2, both[..., None]).sum((1, 2)).argmax()
        assert torch.equal(found[0], both[best])

    def test_accumulated_gradients_are_those_of_the_large_batch(self, tmp_path):
        model, embeddings = make(), rows(4, DIM)
        labels = labels_of(BATCH)
        labels[0, -2:] = -100  # as many labels in neither row as in the other
        count = labels[:, 1:].ne(-100).sum()
        model(BATCH, embeddings, labels=labels).loss.backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        for row in range(2):
            part, images = slice(row, row + 1), slice(2 * row, 2 * row + 2)
            model(BATCH[part], embeddings[images], labels=labels[part], num_items_in_batch=count).loss.backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        trainer = Trainer(model, TrainingArguments(tmp_path, report_to=[]))
        assert trainer.model_accepts_loss_kwargs
        trainer._set_signature_columns_if_needed()
        assert {"input_ids", "labels", "embeddings", "position_ids"} <= set(trainer._signature_columns)

    def test_language_models_own_word_on_loss_counts(self):
        lm = language_model()
        lm.accepts_loss_kwargs = False
        assert not make(lm=lm).accepts_loss_kwargs

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks
    def test_peft(self, tmp_path):
        model, embeddings = make(), rows(4, DIM)
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["projector"], task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, config)
        adapted(input_ids=BATCH, embeddings=embeddings, labels=labels_of(BATCH)).loss.backward()
        torch.optim.SGD(adapted.parameters(), lr=1.0).step()
        adapted.save_pretrained(tmp_path)
        model.save_projector(tmp_path / "projector.safetensors")
        for name in ("adapter_model.safetensors", "projector.safetensors"):
            again = make()
            assert not torch.equal(again.projector[0].weight, model.projector.tensors()["0.weight"])
            again.load_projector(tmp_path / name)
            assert all(torch.equal(model.projector.tensors()[n], t) for n, t in again.projector.tensors().items())
        found = adapted.generate(input_ids=BATCH, embeddings=embeddings, max_new_tokens=3, do_sample=False)
        assert found.shape[0] == 2


def pairs(one, other):
    return list(zip(one.state_dict().values(), other.state_dict().values(), strict=True))


class TestPacking:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_samples_in_a_row_are_as_apart(self, kind, attention):
        model, embeddings = make(kind, attention, num_visual_tokens=2), rows(4, DIM)
        samples = [
            ([1, IMAGE, IMAGE, 5], embeddings[:1]),
            ([1, 7, IMAGE, IMAGE, 4, IMAGE, IMAGE, 3], embeddings[1:3]),
            ([6, IMAGE, IMAGE, 9, 9], embeddings[3:]),
        ]
        row = torch.tensor([[token for ids, _ in samples for token in ids]])
        positions = torch.tensor([[place for ids, _ in samples for place in range(len(ids))]])
        apart = torch.cat([model(torch.tensor([ids]), images).logits for ids, images in samples], dim=1)
        for module in (model.eval(), model.train()):
            module.requires_grad_(True)
            for dropout in module.modules():
                dropout.p = 0.0
            torch.testing.assert_close(module(row, embeddings, position_ids=positions).logits, apart)
        check_packing(model)
        assert model.training

    @pytest.mark.parametrize("kind", ["qwen2", "gpt_neox"])
    def test_other_families_pass_the_check(self, kind):
        check_packing(make(kind, image_token_id=3))

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_models_that_cannot_are_refused(self, attention):
        config = OPTConfig(
            vocab_size=5, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=2,
            ffn_dim=16, max_position_embeddings=32,
        )  # fmt: skip
        lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        with pytest.raises(ValueError, match="OPTForCausalLM lets packed samples see each other"):
            check_packing(make(lm=lm))

    def test_models_without_positions_are_refused(self):
        lm = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2))
        with pytest.raises(ValueError, match="BloomForCausalLM lets packed samples see each other"):
            check_packing(make(lm=lm))


SUFFIXES = (".safetensors", ".bin")


class TestProjectorFiles:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize(
        ("style", "projector"),
        [("realign", "mlp"), ("realign", "linear"), ("llava", "mlp"), ("llava", "linear"), ("transformers", "mlp")],
    )
    @pytest.mark.parametrize("num_projected_tokens", [1, 3])
    def test_come_back(self, tmp_path, suffix, style, projector, num_projected_tokens):
        options = {"projector": projector, "num_projected_tokens": num_projected_tokens, "num_visual_tokens": 3}
        model, other = make(**options), make(**options, lm=language_model("gpt2"))
        path = tmp_path / f"projector{suffix}"
        model.save_projector(path, style)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        other.load_projector(path)
        assert all(torch.equal(a, b) for a, b in pairs(model.projector, other.projector))
        assert all(parameter.requires_grad for parameter in other.projector.parameters())
        data = path.read_bytes()
        model.save_projector(path, style)
        assert path.read_bytes() == data

    def test_llava_names(self, tmp_path):
        model = make()
        model.save_projector(tmp_path / "mm_projector.bin", "llava")
        tensors = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
        # How LLaVA and Bunny find them: by whole name, and by what follows "mm_projector.".
        assert set(tensors) == {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
        theirs = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))
        theirs.load_state_dict({key.split("mm_projector.")[1]: tensor for key, tensor in tensors.items()})
        embeddings = rows(3, DIM)
        assert torch.equal(theirs(embeddings), model.projector(embeddings))

    def test_transformers_llava(self, tmp_path):
        vision = CLIPVisionConfig(
            hidden_size=DIM,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
        theirs = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=language_model().config))
        theirs.save_pretrained(tmp_path)
        model = make()
        model.load_projector(tmp_path / "model.safetensors")
        projector = next(m for name, m in theirs.named_modules() if name.endswith("multi_modal_projector"))
        embeddings = rows(3, DIM)
        assert torch.equal(model.projector(embeddings), projector(embeddings))
        model = make()
        model.save_projector(tmp_path / "projector.safetensors", "transformers")
        tensors = load_file(tmp_path / "projector.safetensors")
        projector.load_state_dict({key.removeprefix("multi_modal_projector."): t for key, t in tensors.items()})
        assert torch.equal(model.projector(embeddings), projector(embeddings))

    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
    @pytest.mark.parametrize("name", ["projector.{}", "mm_projector.{}", "multi_modal_projector.linear_{}"])
    def test_prefixes_and_other_tensors(self, tmp_path, suffix, prefix, name):
        model, other = make(), make(lm=language_model("gpt2"))
        layers = (1, 2) if "linear_" in name else (0, 2)
        tensors = {"model.embed_tokens.weight": rows(4, 4), "vision_projector.0.weight": rows(2, 2)}
        for layer, ours in zip(layers, (0, 2), strict=True):
            for kind in ("weight", "bias"):
                tensors[f"{prefix}{name.format(layer)}.{kind}"] = getattr(model.projector[ours], kind).detach().half()
        path = tmp_path / f"p{suffix}"
        save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
        other.load_projector(path)
        assert all(torch.equal(a.half().float(), b) for a, b in pairs(model.projector, other.projector))

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_another_projector_is_refused_and_changes_nothing(self, tmp_path, suffix):
        model = make()
        before = copy.deepcopy(model.projector.state_dict())
        path = tmp_path / f"p{suffix}"
        refusals = {
            rf"p{suffix}: tensor 'model.mm_projector.2.weight' must be floating point of shape \(16, 16\), "
            r"got torch.float32 of shape \(48, 16\)": make(num_projected_tokens=3, num_visual_tokens=3),
            rf"p{suffix}: expected the tensors 0.weight, 0.bias, 2.weight, 2.bias of a projector, got "
            "model.mm_projector.*": make(projector="linear"),
        }
        for message, other in refusals.items():
            other.save_projector(path, "llava")
            with pytest.raises(ValueError, match=message):
                model.load_projector(path)
        for extra, message in {
            "mm_projector.4.weight": "got .*mm_projector.4.weight",  # a third layer
            "other.mm_projector.0.weight": "holds two projectors: .*'other.mm_projector.0.weight'",
        }.items():
            model.save_projector(path, "llava")
            tensors = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
            tensors[extra] = rows(HIDDEN, DIM)
            save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
            with pytest.raises(ValueError, match=message):
                model.load_projector(path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.projector.state_dict().items())

    def test_what_cannot_be_saved(self, tmp_path):
        for path, style, options, message in (
            ("p.pt", "realign", {}, r"ends in .safetensors or .bin, got '.pt'"),
            ("p.bin", "bunny", {}, "style 'bunny' has no projector of 2 Linear layers"),
            ("p.bin", "transformers", {"projector": "linear"}, "style 'transformers' has no projector of 1"),
            ("p.bin", "realign", {"projector": "identity", "embedding_dim": HIDDEN}, "no projector of 0"),
        ):
            with pytest.raises(ValueError, match=message):
                make(**options).save_projector(tmp_path / path, style)
        with pytest.raises(ValueError, match=r"ends in .safetensors or .bin, got '.pkl'"):
            make().load_projector(tmp_path / "p.pkl")
        for suffix in SUFFIXES:
            with pytest.raises(FileNotFoundError):
                make().load_projector(tmp_path / f"none{suffix}")
        assert not list(tmp_path.iterdir())

    def test_failing_in_the_middle_leaves_the_old_file(self, tmp_path, monkeypatch):
        model, path = make(), tmp_path / "p.bin"
        model.save_projector(path)
        before = path.read_bytes()

        def fail(_, file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="No space left"):
            model.save_projector(path)
        assert path.read_bytes() == before
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize("legacy", [False, True])
    def test_a_pickle_that_runs_something_is_refused(self, tmp_path, legacy):
        path, marker = tmp_path / "mm_projector.bin", tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return Path.touch, (marker,)

        tensors = {f"model.mm_projector.{name}": t.detach() for name, t in make().projector.tensors().items()}
        contents = {**tensors, "model.mm_projector.evil": Evil()}
        torch.save(contents, path, _use_new_zipfile_serialization=not legacy)
        for data in (path.read_bytes(), pickle.dumps(contents, protocol=2)):
            path.write_bytes(data)
            with pytest.raises(ValueError, match=r"mm_projector.bin is damaged, or holds more than tensors") as caught:
                make().load_projector(path)
            assert "\n" not in str(caught.value)
            assert not marker.exists()

    @pytest.mark.parametrize("contents", [[1, 2], {"a": 3}, torch.zeros(2)])
    def test_other_contents_are_refused(self, tmp_path, contents):
        torch.save(contents, tmp_path / "p.bin")
        with pytest.raises(ValueError, match="must hold a dict of tensors"):
            make().load_projector(tmp_path / "p.bin")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_damaged_files_are_a_value_error(self, tmp_path, suffix):
        model, path = make(), tmp_path / f"p{suffix}"
        model.save_projector(path)
        whole, rng = path.read_bytes(), random.Random(0)
        for attempt in range(150):
            data = bytearray(whole)
            if attempt % 3:
                for _ in range(rng.randint(1, 4)):
                    data[rng.randrange(min(len(data), 1500))] = rng.randrange(256)
            else:
                del data[rng.randrange(len(data)) :]
            path.write_bytes(data)
            with contextlib.suppress(ValueError):  # whatever else comes through is a bug
                model.load_projector(path)


def test_config_is_read_from_a_dict():
    config = ReVisionConfig({"model_type": "gpt2", "n_embd": 8}, embedding_dim=4, image_token_id=7)
    assert isinstance(config.text_config, GPT2Config)
    assert ReVisionConfig(**config.to_dict()).text_config.hidden_size == 8

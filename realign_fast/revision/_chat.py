"""Records as chats: messages, their tokens by the tokenizer's own template, and which of these are to be learnt."""

from __future__ import annotations

import re
from typing import Any

IMAGE_TOKEN = "<image>"
IGNORED = -100  # the label of a token that is not to be learnt, for the losses of torch and transformers

# For language models that know no chats: what the user says, a line break, the answer and the end of text.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
)

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ADVICE = "mark the answers in it with {% generation %} and {% endgeneration %}"


def add_image_token(tokenizer: Any) -> int:
    """Return the id of `<image>`, which becomes a special token of the tokenizer where it is none."""
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def messages_of(record: dict[str, Any], prompt: str = "") -> list[dict[str, str]]:
    """Return the messages of a record of LLaVA or Bunny, `role` and `content` of each.

    Without `conversations`, its `caption` answers the image and the prompt. ValueError says what is wrong: no messages,
    no answer, or not exactly one `<image>`, outside of the answers.
    """
    turns = record.get("conversations")
    try:
        if turns is None:
            asked = f"{IMAGE_TOKEN}\n{prompt}" if prompt else IMAGE_TOKEN
            turns = [{"from": "user", "value": asked}, {"from": "assistant", "value": record["caption"]}]
        messages = [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
        text = "".join(message["content"] for message in messages)
    except (KeyError, TypeError):
        raise ValueError("neither a caption nor conversations of turns with 'from' and 'value'") from None
    text.encode()  # JSON can hold halves of surrogate pairs, which no tokenizer takes
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no answer")
    found, wrong = text.count(IMAGE_TOKEN), "".join(answers).count(IMAGE_TOKEN)
    if (found, wrong) != (1, 0):
        raise ValueError(f"expected one {IMAGE_TOKEN} and none in an answer, got {found} and {wrong}")
    return messages


def encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Return the ids of the tokens of messages and their labels, -100 where nothing is to be learnt.

    To be learnt are the answers and the token that ends each. They are what the chat template says between its
    generation markers, or else what its text adds to that of the turns before; either way places in the whole text,
    which becomes tokens at once. The tokenizer is a fast one of transformers, with `<image>`.

    jinja2.TemplateError if the template refuses the messages; ValueError if there is none, it does not show `<image>`
    once, or it does not tell the answers.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: set its chat_template, for instance to PLAIN_TEMPLATE, on the command "
            "line by --chat_template FILE or plain"
        )
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        learnt = found["assistant_masks"]
    else:
        text = _text(tokenizer, messages)
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [_span(tokenizer, text, messages, number) for number in numbers]
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # A token that reaches into an answer belongs to it, as between markers: else its first word could get lost.
        learnt = [any(a < end and b > begin for begin, end in spans) for a, b in found["offset_mapping"]]
    ids = found["input_ids"]
    image_place(ids, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    return ids, [token if chosen else IGNORED for token, chosen in zip(ids, learnt, strict=True)]


def image_place(ids: list[int], image_token_id: int) -> int:
    """Return where `<image>` stands among the tokens that a template has made; ValueError if not once."""
    if (count := ids.count(image_token_id)) != 1:
        raise ValueError(f"the chat template makes {count} {IMAGE_TOKEN} tokens of one placeholder")
    return ids.index(image_token_id)


def _text(tokenizer: Any, messages: list[dict[str, str]], *, ask: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))


def _span(tokenizer: Any, text: str, messages: list[dict[str, str]], number: int) -> tuple[int, int]:
    """Return where in the text an answer begins and ends."""
    before, after = _text(tokenizer, messages[:number], ask=True), _text(tokenizer, messages[: number + 1])
    if not (text.startswith(after) and after.startswith(before)):
        raise ValueError(f"the chat template changes what it says of earlier turns: {_ADVICE}")
    answer, said = messages[number]["content"].strip(), after[len(before) :]
    if not said.lstrip().startswith(answer):
        raise ValueError(f"the chat template does not tell where the answer {answer[:40]!r} begins: {_ADVICE}")
    # White space behind a token that ends the turn is not the assistant's; without such a token it is what ends it.
    ended = said.rstrip()
    return len(before), len(before) + len(said if ended.endswith(answer) else ended)

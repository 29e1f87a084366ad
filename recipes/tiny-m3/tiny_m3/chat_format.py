"""M3's chat format for tiny-m3: special tokens, the template, and the 4,096-token vocabulary."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
BOS, TURN, EOS = "]~!b[", "]~b]", "[e~["
IMAGE, VIDEO = "]<]image[>[", "]<]video[>["
MARK, THINK, END_THINK = "]<]minimax[>[", "<mm:think>", "</mm:think>"
SPECIAL = (BOS, TURN, EOS, IMAGE, VIDEO)
# Ordinary added tokens: decoding with skip_special_tokens keeps them, so parsers can see them.
VISIBLE = (MARK, THINK, END_THINK)

ADDED = SPECIAL + VISIBLE

TEMPLATE_FILE = Path(__file__).parent / "chat_template.jinja"


@functools.cache
def _template() -> Template:
    """The chat template in the environment in which transformers renders it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(TEMPLATE_FILE.read_text())


def render(
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    thinking_mode: str = "adaptive",
    add_generation_prompt: bool = False,
) -> str:
    """One chat as the text that the model reads; equal to transformers' apply_chat_template."""
    return _template().render(
        messages=messages,
        tools=tools,
        thinking_mode=thinking_mode,
        add_generation_prompt=add_generation_prompt,
    )


def added_id(token: str, vocab_size: int) -> int:
    """The id of an added token: they take the last ids of the vocabulary, as M3's do."""
    return vocab_size - len(ADDED) + ADDED.index(token)


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must exist."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer has no {token}")
    return number


def build_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE over `texts`; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Markers in the training text must not shape the merges.
            pre_tokenizers.Split(Regex("|".join(_escape(t) for t in ADDED)), "removed"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in VISIBLE])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"{tokenizer.get_vocab_size()} tokens learnt, {vocab_size} wanted")
    return tokenizer


def _escape(text: str) -> str:
    """`text` as a regular expression for the tokenizers library (Oniguruma)."""
    return "".join("\\" + c if c in "]~![<>:/" else c for c in text)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_len: int) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = TEMPLATE_FILE.read_text()
    (folder / "chat_template.jinja").write_text(template)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "additional_special_tokens": [TURN, IMAGE, VIDEO],
        "model_max_length": max_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n")

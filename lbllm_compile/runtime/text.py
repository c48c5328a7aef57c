"""A tokenizer from the files that lie in an artifact, for programs that run without torch and transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


class TextTokenizer:
    """What :class:`~.language.LanguageModel` needs of a transformers tokenizer, on the ``tokenizers`` library alone.

    Attributes:
        chat_template: a Jinja template, or None.
        eos_token_id: the token that ends a text, or None.
    """

    def __init__(self, directory: Path):
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_file(str(directory / TOKENIZER))
        settings_file, template_file = directory / SETTINGS, directory / TEMPLATE
        self._settings = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
        template = template_file.read_text() if template_file.is_file() else self._settings.get("chat_template")
        self.chat_template: str | None = template if isinstance(template, str) else None
        self._special = {k: _content(v) for k, v in self._settings.items() if k.endswith("_token") and _content(v)}
        end = self._special.get("eos_token")
        self.eos_token_id: int | None = None if end is None else self._tokenizer.token_to_id(end)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation. The template is data from the artifact, so it runs in Jinja's sandbox."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        assert self.chat_template is not None and not tokenize
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _raise
        template = environment.from_string(self.chat_template)
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._special)


_SAMPLES = ("Hello, world!", "  two  spaces\n\tand a tab", "42 = 6*7; naïve façade, \u4f60\u597d \U0001f600", "")
"""Texts on which two tokenizers are compared."""


def agrees(tokenizer: Any, folder: Path) -> bool:
    """Whether :class:`TextTokenizer` does what a transformers tokenizer does.

    Args:
        tokenizer: the transformers tokenizer.
        folder: an empty folder to store it in for the comparison.
    """
    tokenizer.save_pretrained(str(folder))
    if not (folder / TOKENIZER).is_file():
        return False
    plain = TextTokenizer(folder)
    for text in _SAMPLES:
        ids = tokenizer(text)["input_ids"]
        if plain(text)["input_ids"] != ids:
            return False
        if plain.decode(ids, True) != tokenizer.decode(ids, skip_special_tokens=True):
            return False
    if bool(plain.chat_template) != bool(getattr(tokenizer, "chat_template", None)):
        return False
    if plain.eos_token_id != getattr(tokenizer, "eos_token_id", None):
        return False
    turn = [{"role": "user", "content": "Why?"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    return not plain.chat_template or plain.apply_chat_template(turn, **options) == tokenizer.apply_chat_template(
        turn, **options
    )


def _content(token: Any) -> str | None:
    """The text of a special token, which settings give plainly or as an object."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _raise(message: str) -> None:
    raise ValueError(message)

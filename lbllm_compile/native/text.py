"""A tokenizer from the files that lie in an artifact, for programs that run without torch and transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from lbllm_compile.native.generate import GenerationError

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


class TextTokenizer:
    """What :class:`~.language.LanguageModel` needs of a transformers tokenizer, on the ``tokenizers`` library alone.

    Attributes:
        chat_template: a Jinja template, or None.
        eos_token_id: the token that ends a text, or None.

    Raises:
        GenerationError: the files cannot be read.
    """

    def __init__(self, directory: Path):
        from tokenizers import Tokenizer

        settings_file, template_file = directory / SETTINGS, directory / TEMPLATE
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(directory / TOKENIZER))
            settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
            template = template_file.read_text(encoding="utf-8") if template_file.is_file() else None
            self._special = {k: _content(v) for k, v in settings.items() if k.endswith("_token") and _content(v)}
        except Exception as error:  # of the tokenizers library, which has one class for all
            raise GenerationError(
                f"the tokenizer in '{directory}' cannot be read ({error}); copy or compile the artifact again"
            ) from error
        template = settings.get("chat_template") if template is None else template
        self.chat_template: str | None = template if isinstance(template, str) else None
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
        """The text of a conversation, as transformers would render it.

        Raises:
            jinja2.TemplateError: the template is malformed, or raises.
        """
        assert self.chat_template is not None and not tokenize
        template = _environment().from_string(self.chat_template)
        options = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return template.render(tools=None, documents=None, **options, **self._special)


def _environment() -> Any:
    """What templates are rendered in: the same settings, extensions, filters and globals as in transformers'
    ``utils/chat_template_utils.py``. A template is data from the artifact, so it runs in Jinja's sandbox."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """``{% generation %}`` blocks, which mark an assistant's turn for training: here just what is in them."""

        tags: ClassVar = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class PublicNamespace(Namespace):
        """A namespace without private names, behind which Python's internals are."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            for name in dict(*rest, **kwargs):
                PublicNamespace._check(name)
            Namespace.__init__(self, *rest, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            PublicNamespace._check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"the chat template stores the private name {name!r} in a namespace")

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": PublicNamespace,
    }
    return environment


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
    return not plain.chat_template or _rendered(plain) == _rendered(tokenizer)


def _rendered(tokenizer: Any) -> str | None:
    """A turn of a user in the chat template; None where the template refuses it, as some do without a system's turn."""
    turn = [{"role": "user", "content": "Why?"}]
    try:
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may fail in any way; what counts is whether both fail
        return None


def _content(token: Any) -> str | None:
    """The text of a special token, which settings give plainly or as an object."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None

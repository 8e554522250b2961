"""The tokenizer that a GGUF file's metadata describes, in transformers' files."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from metal_models.errors import MetalModelsError, UnsupportedModelError
from metal_models.gguf.file import GGUFFile

logger = logging.getLogger(__name__)

# Values of tokenizer.ggml.pre. transformers reads those of Llama 3 and Qwen itself.
_LIKE_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo"}
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_LLAMA3 = {"llama3", "llama-v3", "llama-bpe", "falcon3"}
_WHOLE_WORDS_FIRST = _LLAMA3 | {"tekken"}


def write_tokenizer(file: GGUFFile, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template.

    They are converted with transformers' own converter, then completed with what that leaves out: single
    digits as words of their own, words looked up before merges are tried, the tokens put before and after
    a text, and the context length.

    Raises:
        UnsupportedModelError: transformers cannot convert the file's tokenizer.
        MetalModelsError: torch, which that converter imports, is not installed.
    """
    if find_spec("torch") is None:
        raise MetalModelsError(
            "[write_tokenizer] expected torch, which transformers' converter imports, got none. "
            "Run: pip install 'metal-models[torch]'."
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
        backend = tokenizer.backend_tokenizer
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UnsupportedModelError(
            file.architecture, f"transformers cannot convert the tokenizer in {file.path} ({error})"
        ) from error
    _set_words(backend, file)
    _set_ends(backend, file)
    if (context := file.get("context_length")) is not None:
        tokenizer.model_max_length = context
    tokenizer.save_pretrained(str(directory))


def _set_words(backend: Any, file: GGUFFile) -> None:
    """Cut text into the words that the vocabulary's merges were learned on."""
    from tokenizers import pre_tokenizers

    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    words = backend.pre_tokenizer
    if pre in _DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    elif isinstance(words, pre_tokenizers.ByteLevel) and pre not in _LIKE_GPT2:
        logger.warning(
            "%s: cutting text into words as GPT-2 does, for want of the rules of %r: some texts may be "
            "tokenised differently from the original model.",
            file.path.name,
            pre,
        )
    if pre in _WHOLE_WORDS_FIRST:
        backend.model.ignore_merges = True


def _set_ends(backend: Any, file: GGUFFile) -> None:
    """Put the tokens before and after a text that llama.cpp would."""
    from tokenizers.processors import TemplateProcessing

    metadata = file.metadata
    sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    starts = sentencepiece or metadata.get("tokenizer.ggml.pre") in _LLAMA3
    before = _token(file, "bos") if metadata.get("tokenizer.ggml.add_bos_token", starts) else None
    after = _token(file, "eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    single = [*([before[0]] if before else []), "$A", *([after[0]] if after else [])]
    pair = [*single, *(part.replace("$A", "$B") + ":1" for part in single)]
    ends = [token for token in (before, after) if token]
    backend.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=ends)


def _token(file: GGUFFile, kind: str) -> tuple[str, int] | None:
    number = file.metadata.get(f"tokenizer.ggml.{kind}_token_id")
    return None if number is None else (file.metadata["tokenizer.ggml.tokens"][number], number)

"""Small tokenizers: of bytes, of words, of letters."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

from support.models import VOCABULARY


def byte_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Bytes as tokens, with a BOS in front if asked: every offset is known."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i + 1 for i, c in enumerate(alphabet)} | {"<s>": 0}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", clean_up_tokenization_spaces=False)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token of the tiny models."""
    made = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")


class Letters:
    """The tokenizer of a tiny model: a token a letter, by its ASCII number."""

    eos_token_id = None
    chat_template = None

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        ids = [min(ord(letter), VOCABULARY - 1) for letter in text]
        return BatchEncoding({"input_ids": ids, "offset_mapping": [(at, at + 1) for at in range(len(text))]})

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i) for i in ids)


class ChatLetters(Letters):
    """Letters with a chat template: ``<user>`` before a message, ``|`` after it."""

    chat_template = "<role>content|"

    def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=True, return_dict=False):
        text = "".join(f"<{message['role'][0]}>{message['content']}|" for message in messages)
        text += "<a>" if add_generation_prompt else ""
        return self(text) if tokenize else text

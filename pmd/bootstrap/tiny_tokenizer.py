"""The tokenizer of the tiny worlds: one token per word, as a plain Hugging Face fast tokenizer.

It adds no special tokens; prompts contain their own `<bos>`. Unknown words raise, so that a typo is never trained on.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from pmd.tasks.prompts.words import BOS, EOS, PAD, VOCABULARY

MAX_POSITIONS = 512


def make_tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a world's language; decoding joins words with single spaces."""
    words = WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unknown word>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )

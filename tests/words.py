"""A tokenizer whose tokens are words, and texts of these words, so that a test can compute the ids by hand."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sae_accel.data.tokens import load_tokens
from sae_accel.recipe.arguments import DataArguments


EOS, BOS, WORDS = 0, 1, 50
VOCAB = WORDS + 3


def make_tokenizer(eos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer in which word `w7` has id 10. Texts start with BOS unless special tokens are off."""
    vocab = {"<eos>": EOS, "<bos>": BOS, "<unk>": 2} | {f"w{i}": i + 3 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = {"bos_token": "<bos>", "unk_token": "<unk>"} | ({"eos_token": "<eos>"} if eos else {})
    # The tokenizer states only 8 positions, and longer texts must not be cut.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **names)


def make_texts(count: int, words: int = 11) -> list[str]:
    return [" ".join(f"w{(7 * i + j * j) % WORDS}" for j in range(words)) for i in range(count)]


def ids_by_hand(texts: list[str]) -> list[int]:
    return [token for text in texts for token in [*(int(word[1:]) + 3 for word in text.split()), EOS]]


def rows_of(dataset) -> list[list[int]]:
    return [[int(token) for token in row["input_ids"]] for row in dataset]


def load(path, **kwargs):
    options = {"ctx_len": 16, "eval_examples": 2} | kwargs
    vocab_size = options.pop("vocab_size", VOCAB)
    return load_tokens(DataArguments(path=str(path), **options), make_tokenizer(), vocab_size=vocab_size)

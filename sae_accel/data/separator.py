"""Finds the token that separates documents."""

from transformers import PreTrainedTokenizerBase

from ..common.errors import InputError, near


def separator_id(
    separator: str | int | None, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> int:
    """
    Returns the id of the token that follows each document.

    Args:
        separator (`str` or `int`, *optional*): A token, or its id. If not given, EOS, or SEP if there is no EOS.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer that knows the token.
        vocab_size (`int`, *optional*): Ids that the LM knows.

    Raises:
        `InputError`: if there is no such token, or none is given and the tokenizer has neither EOS nor SEP.
    """
    if separator is None:
        found = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        if found is None:
            raise InputError(
                "data.separator: the tokenizer has no EOS token to put between documents, and no SEP token. Set "
                "--data.separator to a token of the tokenizer or its id, or use data with input_ids."
            )
    elif isinstance(separator, str):
        vocabulary = tokenizer.get_vocab()
        if separator not in vocabulary:
            raise InputError(
                f"data.separator: {separator!r} is not a token of the tokenizer.{near(separator, vocabulary)} Give "
                "a token, or its id as a number."
            )
        found = vocabulary[separator]
    else:
        found = separator
    known = len(tokenizer) if vocab_size is None else vocab_size
    if not 0 <= found < known:
        raise InputError(
            f"data.separator: the id {found} is not one of the {known} ids that are known. Give a token of the "
            "tokenizer, or its id."
        )
    return found

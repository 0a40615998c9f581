from transformers import PreTrainedTokenizerBase

from ..common.errors import InputError, near


def separator_id(
    separator: str | int | None, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> int:
    """
    The id of what stands after each document.

    Args:
        separator (`str` or `int`, *optional*): A token, or its id; EOS if not given, or SEP if there is no EOS.
        tokenizer (`PreTrainedTokenizerBase`): Whose token it is.
        vocab_size (`int`, *optional*): Ids that the LM knows.

    Raises:
        `InputError`: if there is no such token, or none is given and the tokenizer has neither EOS nor SEP.
    """
    if separator is None:
        found = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        if found is None:
            raise InputError(
                "data.separator: the tokenizer has no EOS token to put between documents, and no SEP token. Set it to "
                "a token of the tokenizer or to the id of one, or use data with input_ids."
            )
    elif isinstance(separator, str):
        vocabulary = tokenizer.get_vocab()
        if separator not in vocabulary:
            raise InputError(
                f"data.separator: {separator!r} is no token of the tokenizer.{near(separator, vocabulary)} Name one, "
                "or the id of one as a number."
            )
        found = vocabulary[separator]
    else:
        found = separator
    known = len(tokenizer) if vocab_size is None else vocab_size
    if not 0 <= found < known:
        raise InputError(
            f"data.separator: the id {found} is none of the {known} that are known. Name a token of the tokenizer, or "
            "the id of one."
        )
    return found

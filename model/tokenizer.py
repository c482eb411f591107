"""The tokenizer that belongs to an encoder."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model.encoder import CheckpointError, explain_load_failure
from model.hub import only_local_files


def load_tokenizer(encoder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            encoder, local_files_only=only_local_files(encoder)
        )
    except Exception as error:  # the library raises whatever its parsers do
        if not Path(encoder).is_dir():
            raise CheckpointError(explain_load_failure(encoder, error)) from error
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"Cannot load a tokenizer from {encoder} ({first_line}); the folder needs tokenizer.json or vocab.txt."
        ) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes one up where there are no files
        raise CheckpointError(f"{encoder} holds no tokenizer; the folder needs tokenizer.json or vocab.txt.")
    tokenizer.padding_side = "right"  # so that [CLS] comes first
    if tokenizer.pad_token is None:
        if not tokenizer.all_special_tokens:
            raise CheckpointError(
                f"The tokenizer of {encoder} has no special token that batches could be padded with; name a pad_token "
                "in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.all_special_tokens[0]  # any of them: nothing looks at padding
    return tokenizer

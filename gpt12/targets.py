"""The value that marks a position which is not a training target."""

# As `ignore_index` of torch's cross_entropy. nanoGPT uses -1, so data written for it works here.
IGNORE_INDEX = -1

"""Tokenize a stream of pieces on all cores, in constant memory."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from data.texts import Piece
from data.tokenizers import Tokenizer

BATCH_CHARACTERS = 500_000  # a thread's share at a time: handing it over then costs little

Encoded = tuple[Piece, np.ndarray]


def encode_pieces(
    pieces: Iterable[Piece], tokenizer: Tokenizer, end_ids: list[int]
) -> Iterator[Encoded]:
    """Yield each piece with its ids, in order. end_ids follow a piece that ends its document.

    Threads encode some batches ahead while the caller writes the ones before. (tiktoken and numpy
    let other threads run meanwhile.)
    """
    end = np.array(end_ids, tokenizer.dtype)

    def encode_batch(batch: list[Piece]) -> list[Encoded]:
        encoded = []
        for piece in batch:
            ids = tokenizer.encode(piece.text)
            if piece.end:
                ids = np.concatenate((ids, end))
            encoded.append((piece, ids))
        return encoded

    cores = os.cpu_count() or 1
    waiting: collections.deque[Future[list[Encoded]]] = collections.deque()
    with ThreadPoolExecutor(cores) as threads:
        for batch in _batches(pieces):
            waiting.append(threads.submit(encode_batch, batch))
            if len(waiting) > 2 * cores:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield the pieces in lists of BATCH_CHARACTERS or a little more."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch = []
            characters = 0
    yield batch

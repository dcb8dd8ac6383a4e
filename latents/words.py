"""The words of captions that a model knows, and their numbers, for the condition `text`.

    words = Words.of(images.captions, range(100))    # of training images, kept with the weights
    words.numbers("A large red circle!")        # (length,) int64: from 1, then zeros

An unknown word is no word. So is a word of a single image, from which a model cannot learn what it
means elsewhere.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from latents.captions import Captions

MOST_WORDS = 8192  # the most frequent ones
LONGEST = 77  # words of a caption; more are cut off


@dataclass(frozen=True)
class Words:
    """A vocabulary; a caption has at most `length` of its words."""

    condition: ClassVar = "text"

    names: tuple[str, ...]
    length: int

    @classmethod
    def of(cls, captions: Captions, indices: Iterable[int]) -> "Words":
        """Returns the words that occur in captions of at least two of the images `indices`.

        Raises ValueError without such a word.
        """
        chosen = [captions[index] for index in indices]
        counts = Counter(word for one in chosen for word in {*split_words(" ".join(one))})
        common = sorted((-count, word) for word, count in counts.items() if count > 1)
        if not common:
            raise ValueError("captions: got no word of two images, expected words to learn")
        names = tuple(word for _, word in common[:MOST_WORDS])
        words = cls(names, LONGEST)
        lengths = (len(words.known(caption)) for one in chosen for caption in one)
        return cls(names, min(max(lengths), LONGEST))

    @cached_property
    def number_of(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names, 1)}

    def known(self, caption: str) -> list[int]:
        """Returns the numbers of all known words of a caption."""
        found = map(self.number_of.get, split_words(caption))
        return [number for number in found if number is not None]

    def unknown(self, caption: str) -> list[str]:
        return [word for word in split_words(caption) if word not in self.number_of]

    def numbers(self, caption: str) -> Tensor:
        """Returns the numbers (length,) of the known words of a caption, then zeros."""
        known = self.known(caption)[: self.length]
        return torch.tensor(known + [0] * (self.length - len(known)))

    def rows(self, captions: Sequence[str]) -> Tensor:
        """Returns the numbers (N, length) of captions."""
        return torch.stack([self.numbers(caption) for caption in captions])


def split_words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.casefold())

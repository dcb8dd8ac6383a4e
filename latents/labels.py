"""Class names and numbers, made of what a data set says of its images."""

import os
import re
from collections.abc import Iterable, Sequence

import numpy as np


def number_labels(written: Sequence, one_class: str) -> tuple[list[str], np.ndarray]:
    """Turns labels, numbers or names, into class names in order and the images' numbers.

    Images that all have None are one class of that name. ValueError if only some have.
    """
    unlabelled = sum(label is None for label in written)
    if unlabelled == len(written):
        written = [one_class] * len(written)
    elif unlabelled:
        raise ValueError(f"{unlabelled} images without a label")
    values = sorted(set(written))
    if all(str(value).isdecimal() for value in values):
        values.sort(key=int)
    number_of = {value: number for number, value in enumerate(values)}
    return class_names(map(str, values)), np.array([number_of[value] for value in written])


def class_names(labels: Iterable[str]) -> list[str]:
    """Labels as text of one line, each another one; a folder may be called anything."""
    names = {}
    for label in labels:
        name = re.sub(r"[\0-\x1f\x7f]", " ", os.fsencode(label).decode(errors="replace"))
        while name in names:
            name += "'"
        names[name] = label
    return list(names)

"""CIFAR's pickles, read without making any object that they name."""

import pickle
from typing import BinaryIO

import numpy as np


class _Bytes:
    """Bytes and a shape, in place of numpy's array and of its type: those obey what a pickle says about memory."""

    def __init__(self, *arguments: object):
        self.state = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        _, shape, _, in_columns, content = self.state
        content = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if in_columns else "C")


KNOWN = {
    "numpy.core.multiarray._reconstruct": _Bytes,
    "numpy._core.multiarray._reconstruct": _Bytes,
    "numpy.ndarray": _Bytes,
    "numpy.dtype": _Bytes,
    "_codecs.encode": str.encode,  # how Python 3 writes bytes in the protocol of Python 2
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if f"{module}.{name}" not in KNOWN:
            raise pickle.UnpicklingError(f"refused: it holds {module}.{name}, not plain data, and could run code")
        return KNOWN[f"{module}.{name}"]


def load(file: BinaryIO, encoding: str = "ASCII") -> object:
    """As `pickle.load`, for plain data and arrays of bytes (`np.asarray` makes the array).

    Raises:
        UnpicklingError: it holds anything else. A damaged file makes the reader fail in any way.
    """
    return _Reader(file, encoding=encoding).load()

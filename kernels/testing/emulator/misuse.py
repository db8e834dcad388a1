"""What a first try at `virtual_gpu` gets wrong, and the errors that say how it is meant."""

from __future__ import annotations

import inspect
from typing import Any


class OfBlocks(type):
    """The type of a class whose objects are made without positional arguments, for ``with`` blocks."""

    def __call__(cls, *given: Any, **settings: Any) -> Any:
        if given:
            raise no_decorator(given[0])
        return super().__call__(**settings)

    def __enter__(cls) -> None:
        raise TypeError(f"{cls.__name__}: expected an object, got the class; write `with {cls.__name__}():`")

    def __exit__(cls, *error: object) -> None:
        """Make the class look like what `with` takes, so that `__enter__` is asked."""

    @property
    def __signature__(cls) -> inspect.Signature:
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def no_decorator(given: object) -> TypeError:
    """Return the error for something given to `virtual_gpu`, most likely the function below it."""
    return TypeError(
        f"virtual_gpu: expected settings by name, got {given!r}; it is no decorator: write `with virtual_gpu():` "
        "around the launches, or take the fixture of that name in a test"
    )

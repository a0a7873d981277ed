"""Names of classes in files: those of the library are short, all others say where they are imported from."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

T = TypeVar("T")
#: What classes of the library were called in files that were written before.
_FORMER = {"Direct": "DirectSum"}


class Unknown(ValueError):
    """A file names a class that nothing has defined so far."""


class Registry(Generic[T]):
    """Classes by the names that files give them.

    A class of the library has its own name, which stays what it is when the class moves to another file; any other has
    ``module.qualname``, so that a user's class never takes the place of one of ours. Defining a class again (a cell of
    a notebook that is run twice, a module that is reloaded) replaces it.

    what: what they are, for messages.

    >>> class Block:
    ...     pass
    >>> known = Registry("block")
    >>> known.add(Block)
    >>> known.find(known.name_of(Block)) is Block
    True
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._classes: dict[str, type[T]] = {}

    def add(self, cls: type[T]) -> None:
        """Raises ``TypeError`` for a second class of the library that has the name of another."""
        name = name_in_files(cls)
        other = self._classes.get(name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"two {self._what} classes are called {name!r} in files, one in {other.__module__} and one in "
                f"{cls.__module__}: rename one"
            )
        self._classes[name] = cls

    def name_of(self, cls: type[T]) -> str:
        """What files call a class. Raises ``TypeError`` if they would then mean another one."""
        name = name_in_files(cls)
        if self._classes.get(name) is not cls:
            raise TypeError(
                f"this {self._what} is of a class {name} that has been defined again since, and a file would be read "
                "as one of the new class: make the matrix again, or give the classes different names"
            )
        return name

    def find(self, name: Any) -> type[T]:
        """The class of that name. Raises ``KeyError`` for what is no name of a class, :class:`Unknown` for one that is
        not imported.
        """
        found = self._classes.get(_FORMER.get(name, name) if isinstance(name, str) else name)
        if found is None and isinstance(name, str) and "." in name:
            raise Unknown(f"it has a {self._what} of the class {name}, which is not defined here: {_remedy(name)}")
        return self._classes[name] if found is None else found

    def ours(self) -> list[str]:
        """The names of those of the library."""
        return [name for name in self._classes if "." not in name]


def name_in_files(cls: type) -> str:
    """Its own name for a class of the library, which may move to another file; ``module.qualname`` for any other."""
    package = __name__.partition(".")[0]
    ours = cls.__module__.partition(".")[0] == package and "." not in cls.__qualname__
    return cls.__qualname__ if ours else f"{cls.__module__}.{cls.__qualname__}"


def _remedy(name: str) -> str:
    outside, _, inside = name.partition(".<locals>.")
    module = outside.rpartition(".")[0]
    if module == "__main__":
        return f"define {name.removeprefix('__main__.')} before loading"
    if inside:
        return f"import {module} and call {outside.rpartition('.')[2]}, which defines it, before loading"
    return f"import {module} before loading"

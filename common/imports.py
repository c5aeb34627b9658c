"""What happens when another package is imported, and what it finds then."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


@contextlib.contextmanager
def without(module: str) -> Iterator[None]:
    """Have what is imported meanwhile find that `module` is not installed, unless it has been imported already.

    For packages that import a slow one only to have it at hand.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # the import system's own mark
    try:
        yield
    finally:
        del sys.modules[module]


def when_imported(module: str, call: Callable[[ModuleType], object]) -> None:
    """Call `call` with a module as soon as it has been imported: at once if it has been, else after its import."""
    if module in sys.modules:
        call(sys.modules[module])
    else:
        sys.meta_path.insert(0, _Watcher(module, call))


class _Watcher(MetaPathFinder):
    """Finds one module by the other finders, and has `call` called after its code has run."""

    def __init__(self, module: str, call: Callable[[ModuleType], object]) -> None:
        self.module, self.call = module, call

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                self.call(module)

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec

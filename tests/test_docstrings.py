"""The examples in docstrings run, and every public class and function has one."""

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import jfbfast

OPTIONAL = {"torchdeq", "kornia"}  # in the extra `bench`, which the tests do without


def module_names() -> list[str]:
    """The package's modules, without compiled ones and `__main__`."""
    found = [name for _, name, _ in pkgutil.walk_packages(jfbfast.__path__, "jfbfast.")]
    return ["jfbfast", *(name for name in found if not name.rpartition(".")[2].startswith("_"))]


def imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name in OPTIONAL or name.startswith("jfbfast.kernels"):
            pytest.skip(str(error))
        raise


def examples(module: ModuleType) -> list[doctest.DocTest]:
    """The module's doctests, each in an empty namespace.

    `doctest.testmod` passes over functions in a decorator of torch's, since their globals are torch's.
    """
    found = doctest.DocTestFinder(recurse=False).find(module, globs={})
    for name, value in vars(module).items():
        if (inspect.isclass(value) or inspect.isroutine(value)) and value.__module__ == module.__name__:
            found += doctest.DocTestFinder().find(value, f"{module.__name__}.{name}", module=False, globs={})
    return found


@pytest.mark.parametrize("name", module_names())
def test_the_examples_of_a_module_run(name: str) -> None:
    runner, output = doctest.DocTestRunner(), list[str]()
    failed = sum(runner.run(example, out=output.append).failed for example in examples(imported(name)))
    assert not failed, "".join(output)


def test_every_public_class_and_function_has_an_example() -> None:
    public = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (jfbfast, jfbfast.diagnostics, jfbfast.spectrum)
        for name in module.__all__
    }
    missing = [
        name
        for name, value in public.items()
        if (inspect.isclass(value) or inspect.isroutine(value)) and ">>>" not in (value.__doc__ or "")
    ]
    assert not missing, f"{len(missing)} public names have no example in their docstring: {', '.join(missing)}"

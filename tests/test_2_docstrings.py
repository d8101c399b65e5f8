"""Every public instrument shows in its docstring how it is used, and the example runs."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
from IPython.core.interactiveshell import InteractiveShell

import course_utils

MODULES = [
    "course_utils",
    *(
        info.name
        for info in pkgutil.walk_packages(course_utils.__path__, "course_utils.")
        if info.name.split(".")[1] not in ("checks", "course")
    ),
]


def instruments(module) -> dict[str, object]:
    """The public functions and classes that a module defines itself: those in its __all__, or in
    that of the package it is a part of (measure, serving), or all without an underscore. An
    exception needs no example of its own: what raises it shows it.
    """
    parent = module.__name__.rpartition(".")[0]
    lists = [module, *([importlib.import_module(parent)] if parent.count(".") else [])]
    public = [getattr(one, "__all__", None) for one in lists]
    named = next(filter(None, public), [n for n in vars(module) if not n.startswith("_")])
    named = [n for n in named if hasattr(module, n)]
    found = {name: getattr(module, name) for name in named}
    return {
        name: thing
        for name, thing in found.items()
        if getattr(thing, "__module__", None) == module.__name__
        and (inspect.isroutine(thing) or inspect.isclass(thing))
        and not (inspect.isclass(thing) and issubclass(thing, BaseException))
    }


@pytest.mark.parametrize("name", MODULES)
def test_every_public_instrument_has_an_example(name):
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    bare = [
        known
        for known, thing in instruments(module).items()
        if not any(test.examples for test in finder.find(thing, known, module=module))
    ]
    assert bare == []


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_say_the_truth(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_LEDGER", str(tmp_path / "ledger.jsonl"))
    monkeypatch.setenv("COURSE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(InteractiveShell, "initialized", lambda: False)  # whatever ran before
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        if test.examples:
            runner.run(test)
    assert runner.failures == 0, capsys.readouterr().out

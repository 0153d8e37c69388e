"""What may have been prepared before a training: DeepSpeed's operators compiled, this device measured for the planner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lightning_par.errors import ConfigurationError
from lightning_par.host.doctor.finding import Finding
from lightning_par.planner.calibration import cached_of_device, read_calibration
from lightning_par.private.deepspeed import missing_for_operators

# What needs an operator; without it all else works.
_FOR = {"cpu_adam": "zero.offload_optimizer=cpu and DeepSpeedCPUAdam", "async_io": "zero.offload_optimizer=nvme"}


def operator_findings(device: torch.device) -> list[Finding]:
    """Those of DeepSpeed's operators; none where DeepSpeed is not usable, which `library_findings` tells."""
    try:
        return judge_operators(missing_for_operators(device))
    except ConfigurationError:
        return []


def judge_operators(missing: Mapping[str, Sequence[str] | None]) -> list[Finding]:
    """A finding for each operator.

    Args:
        missing: what the machine lacks for it; None where it is compiled already.
    """
    findings = []
    for name, lacks in missing.items():
        about = f"operator {name}"
        if lacks is None:
            findings.append(Finding(about, f"compiled, for {_FOR[name]}"))
        elif lacks:
            found = f"cannot be compiled, which {_FOR[name]} needs"
            findings.append(Finding(about, found, "warning", f"install {' and '.join(lacks)}"))
        else:
            findings.append(Finding(about, f"is compiled by the first run with {_FOR[name]}, which takes minutes"))
    return findings


def calibration_finding(device: str) -> Finding:
    """Whether `lightning-par calibrate` has measured a device.

    Args:
        device: its name.
    """
    return judge_calibrations(cached_of_device(device))


def judge_calibrations(files: Sequence[Path]) -> Finding:
    """The finding about what was measured.

    Args:
        files: of a device, the newest last.
    """
    about = "calibration"
    if not files:
        return Finding(about, "none: plan takes the rates of datasheets until lightning-par calibrate has run here")
    try:
        found = read_calibration(files[-1])
    except ConfigurationError as error:
        return Finding(about, str(error), "wrong", f"rm {files[-1]}")
    links = ", ".join(found.links) or "none"
    return Finding(about, f"of {found.date}, torch {found.torch}: {len(found.series)} actions of blocks; links: {links}")

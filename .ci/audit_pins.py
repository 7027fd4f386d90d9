"""Ask pip-audit for known vulnerabilities of pinned packages: audit_pins.py FILE; exit status 1 if any.

Where the advisory service cannot be reached, or knows none of the packages (a mirror without advisories), it
says so in one line and passes: linting must not need the network.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_LONGEST_S = 180


def verdict(report: dict[str, Any] | None) -> tuple[int, list[str]]:
    """Exit status and lines for a report in pip-audit's JSON; None where there is none."""
    packages = (report or {}).get("dependencies") or []
    judged = [package for package in packages if "vulns" in package]
    if not judged:
        why = f"it knows none of the {len(packages)} packages" if packages else "it cannot be reached"
        return 0, [f"pip-audit: skipped, since the advisory service does not answer ({why})"]
    bad = [package for package in judged if package["vulns"]]
    lines = [f"pip-audit: {len(judged)} of {len(packages)} packages judged, {len(bad)} vulnerable"]
    for package in bad:
        for found in package["vulns"]:
            mended = ", ".join(found.get("fix_versions") or []) or "no version yet"
            lines.append(f"{package['name']} {package['version']}: {found['id']}, mended in {mended}")
    return int(bool(bad)), lines


def audit(pins: str) -> dict[str, Any] | None:
    """pip-audit's report on a file of pins; None where it could not make one."""
    command = [str(Path(sys.executable).with_name("pip-audit")), "-r", pins, "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LONGEST_S)
        return dict(json.loads(done.stdout))
    except (subprocess.TimeoutExpired, ValueError):
        return None


if __name__ == "__main__":
    status, said = verdict(audit(sys.argv[1]))
    print("\n".join(said))
    sys.exit(status)

"""What is wrong with preference data, and what training on it would cost: `inspect_pairs`.

`findings` says what a check is, and what it finds; the checks stand in modules of their own, listed in
`inspection`, which runs them over the streamed rows. `show` and `page` put the audit before a person.
"""

from dpo_kit.audit.findings import Audit, Finding
from dpo_kit.audit.inspection import inspect_pairs

__all__ = ["Audit", "Finding", "inspect_pairs"]

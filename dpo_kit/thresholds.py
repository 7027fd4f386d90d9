"""From where on a metric says that training goes wrong: the trainer and the report go by the same."""

from __future__ import annotations

# A pair teaches less than this share of what it could (its gradient weight is at most 1): a margin of 4.6.
SATURATED = 0.01

# Nats per token, below the reference, that chosen replies may fall before it is called displacement: a token
# is then on average 0.37 times as likely as it was. Falling is to be expected where the reference was
# fine-tuned on the chosen replies (arXiv 2404.12358) or they are its own samples: in the small world, whose
# run makes samples better, it comes to -0.5. Where it becomes too much is a matter of judgement.
DISPLACED_PER_TOKEN = -1.0

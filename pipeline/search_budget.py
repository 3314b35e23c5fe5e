"""What a search may spend: trials, tokens, hours, money."""

import time
from collections.abc import Iterable

from upath import UPath

from pipeline.config import Config
from pipeline.search_trials import TrialRecord
from pipeline.storage import read_json, write_json

FILE = "spent.json"
HOUR = 3600.0


class Budget:
    """Knows what has been spent, also by earlier drivers of the search, and whether there is more to spend."""

    def __init__(self, config: Config, folder: UPath) -> None:
        self.search, self.folder = config.search, folder
        optimization = config.optimization
        self.tokens_of_a_trial = optimization.steps * optimization.global_batch * config.context.length
        self._before = read_json(folder / FILE)["seconds"] if (folder / FILE).exists() else 0.0
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the search has run; the time between two drivers does not count."""
        return self._before + time.monotonic() - self._began

    def keep(self) -> None:
        """Writes down what has been spent."""
        write_json(self.folder / FILE, {"seconds": self.seconds})

    def cost(self, records: Iterable[TrialRecord]) -> float | None:
        """What the workers have cost; None without a price."""
        price = self.search.worker_hour_price
        return None if price is None else price * sum(record.worker_seconds for record in records) / HOUR

    def exhausted(self, records: Iterable[TrialRecord]) -> str:
        """Why all trials are to end now, in a few words, or ""."""
        search, cost = self.search, self.cost(records)
        if search.max_hours is not None and self.seconds >= search.max_hours * HOUR:
            return f"search.max_hours {search.max_hours:g} is spent"
        if search.max_cost is not None and cost is not None and cost >= search.max_cost:
            return f"search.max_cost {search.max_cost:g} is spent"
        return ""

    def refuses_another(self, records: Iterable[TrialRecord]) -> str:
        """Why no trial is begun any more, in a few words, or "". Tokens are granted for a whole trial."""
        known = list(records)
        if len(known) >= self.search.trials:
            return f"search.trials {self.search.trials} have been begun"
        promised = sum(r.tokens if r.status != "running" else self.tokens_of_a_trial for r in known)
        limit = self.search.max_tokens
        if limit is not None and promised + self.tokens_of_a_trial > limit:
            return f"search.max_tokens {limit:,} leaves no room for another trial of {self.tokens_of_a_trial:,}"
        return self.exhausted(known)

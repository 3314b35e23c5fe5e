"""The records of a search as its driver has them: on the storage at once, or as soon as it takes them."""

import threading
from collections.abc import Callable

from pipeline.config import ConfigError
from pipeline.lease import TakenOver
from pipeline.search_budget import Budget
from pipeline.search_trials import TrialRecord, TrialStore
from pipeline.storage import one_line

TAKEN_OVER = "another driver has taken over this search"


class Records:
    """All trials by number, and what they have spent. A driver that has lost the search writes nothing more."""

    def __init__(
        self, store: TrialStore, budget: Budget, check: Callable[[], None], taken_over: threading.Event
    ) -> None:
        """check: raises TakenOver if another driver has the search; taken_over: is set once that is known."""
        self.store, self.budget, self.check, self.taken_over = store, budget, check, taken_over
        self.all = store.read()
        self.problem = ""
        """Why the storage has not got all records, in one line, or ""."""
        self._unwritten: set[int] = set()

    def keep(self, record: TrialRecord) -> bool:
        """Takes a record over and writes it; False if that has to wait."""
        self.all[record.number] = record
        self._unwritten.add(record.number)
        return self.write()

    def begin(self, record: TrialRecord) -> bool:
        """The same for a trial that is about to start; False, and nothing is kept, if it cannot be written.

        Without its record the next driver would give its number, and so its run, to other settings.
        """
        before = self.all.get(record.number)
        if self.keep(record):
            return True
        self._unwritten.discard(record.number)
        if before is None:
            del self.all[record.number]
        else:
            self.all[record.number] = before
        return False

    def write(self) -> bool:
        """Writes what the storage has not got yet; False if it does not take it now, or another driver is there."""
        if self.taken_over.is_set():
            return False
        try:
            self.check()
            for number in sorted(self._unwritten):
                self.store.write(self.all[number])
                self._unwritten.discard(number)
            self.budget.keep()
        except TakenOver:
            self.taken_over.set()
            return False
        except Exception as error:  # each kind of storage has errors of its own; the trials go on meanwhile
            self.problem = one_line(error)
            return False
        self.problem = ""
        return True

    def finish(self) -> None:
        """Writes what is left; ConfigError, one line, if that is not possible."""
        if self.write():
            return
        if self.taken_over.is_set():
            raise ConfigError(TAKEN_OVER)
        raise ConfigError(f"the search's last records are not written: {self.problem}")

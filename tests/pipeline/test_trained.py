"""What ranks trained, put together: in position order, and refused where positions are missing or doubled."""

import pytest

from pipeline.assignment import FinalError
from pipeline.trained import Part, combine


def part(positions: list[int], loss: float = 1.0) -> Part:
    rows = [(position, 100 + position, 7 * position) for position in positions]
    return Part(rows, [(position, loss) for position in positions], 10 * len(positions), 5.0, positions[0])


def test_rows_of_all_ranks_in_the_order_of_the_run() -> None:
    trained = combine([part([4, 7]), part([5, 6])], range(4, 8))
    assert trained.sequences == [104, 105, 106, 107]
    assert trained.hashes == [28, 35, 42, 49]
    assert (trained.loss, trained.tokens, trained.operations, trained.peak_bytes) == (4.0, 40, 10.0, 5)


def test_losses_are_summed_in_the_order_of_the_run() -> None:
    """1 + 1e16 − 1e16 is 1 or 0: the sum of a step does not depend on who trained what."""
    losses = [1e16, 1.0, -1e16]
    alone = Part([(p, p, p) for p in range(3)], list(enumerate(losses)), 3, 1.0, 0)
    first, second = (Part([(p, p, p) for p in ps], [(p, losses[p]) for p in ps], 1, 1.0, 0) for ps in ([0, 2], [1]))
    assert combine([first, second], range(3)).loss == combine([alone], range(3)).loss == 0.0
    assert sum([losses[0], losses[2], losses[1]]) == 1.0


def test_a_rank_without_a_share_and_a_micro_batch_of_several_rows() -> None:
    several = Part([(5, 105, 35), (4, 104, 28)], [(5, 3.0)], 20, 4.0, 9)
    trained = combine([several, Part([], [], 0, 0.0, 0), part([6])], range(4, 7))
    assert (trained.sequences, trained.loss, trained.peak_bytes) == ([104, 105, 106], 4.0, 9)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ([5, 6], r"of positions 4 to 8 \[8\] are missing and \[\] doubled"),
        ([5, 6, 7, 8], r"of positions 4 to 8 \[\] are missing and \[7\] doubled"),
        ([6, 7], r"\[5, 8\] are missing and \[7\] doubled; nothing was committed; all nodes need the same versions"),
    ],
)
def test_positions_that_are_not_the_step_s_end_the_run(second: list[int], words: str) -> None:
    with pytest.raises(FinalError, match=words):
        combine([part([4, 7]), part(second)], range(4, 9))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_bad_loss_ends_the_run_and_names_the_sequences(loss: float) -> None:
    with pytest.raises(FinalError, match=rf"the loss is {loss} on sequences \[105, 106\]: nothing was committed"):
        combine([part([4, 7]), part([5, 6], loss)], range(4, 8))

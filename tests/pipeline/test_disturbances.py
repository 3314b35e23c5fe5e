import pytest
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from pipeline.disturbances import cause, lost_a_worker

CLOSED = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:34567")

DIED = RuntimeError("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR")


@pytest.mark.parametrize("error", [RayActorError(), DIED, dist.DistNetworkError("timed out"), CLOSED])
def test_a_process_that_is_gone_is_no_error_of_ours(error: Exception) -> None:
    assert lost_a_worker(error)


def test_an_error_of_our_code_is() -> None:
    assert not lost_a_worker(ValueError("the plan has 12 tokens and q 13"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (WorkerGroupError("", {0: CLOSED, 1: DIED}), "worker died"),
        (WorkerGroupError("", {0: CLOSED}), "connection to a worker lost"),
        (WorkerGroupError("", {0: KeyError("x")}), "error in a worker"),
        (ControllerError(TimeoutError("no resources")), "workers could not start"),
    ],
)
def test_the_cause_in_words(error: Exception, words: str) -> None:
    assert cause(error) == words  # type: ignore[arg-type]

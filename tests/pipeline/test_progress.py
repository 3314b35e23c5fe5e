from pipeline.progress import status_line
from pipeline.run_log import Status


def test_the_status_line_says_where_a_run_is() -> None:
    status = Status(
        phase="training",
        step=12,
        steps=40,
        loss=3.9124,
        tokens_per_second=2210.4,
        world_size=2,
        remaining_s=372.0,
        attempt=1,
    )
    assert status_line(status) == "training  step 12/40 · loss 3.912 · 2,210 tokens/s · 2 workers · 6:12 left"


def test_before_the_first_step_it_shows_what_is_known() -> None:
    assert status_line(Status(steps=40)) == "starting workers  step 0/40"

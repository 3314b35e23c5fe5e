from tests.pipeline.conftest import commit_checkpoint, make_run, tiny_base

__all__ = ["commit_checkpoint", "make_run", "tiny_base"]  # fixtures: finished little runs

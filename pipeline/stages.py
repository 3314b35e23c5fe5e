"""The flow of a run: prepare → train → evaluate → export, each skipped where it is done."""

from upath import UPath

from pipeline.config import Config, ConfigError, local_path
from pipeline.lease import refuse_if_held
from pipeline.run_config import check_unchanged
from pipeline.session import ray_session, run_where_the_gpus_are
from pipeline.storage import json_bytes, run_folder


def run_stages(config: Config, command: str) -> int:
    """Runs one stage, or all of them for "run"; 0. ConfigError, one line, for what the user can mend."""
    folder = run_folder(config)
    check_unchanged(config, folder)
    if command in ("run", "train"):
        if (folder / "trials").exists():
            raise ConfigError(f"run.name = {config.run.name!r} is a search: give the run a name of its own")
        refuse_if_held(folder)
    check_model(config)  # last of what is checked: it takes seconds to import
    if command in ("run", "prepare", "train"):
        _prepare_and_train(config, folder, train=command != "prepare")
    if command in ("run", "evaluate"):
        _evaluate(config, folder)
    if command in ("run", "export"):
        from pipeline.export import export

        print(f"exported to {run_where_the_gpus_are(config, export, config, folder)}")
    return 0


def run_search(config: Config) -> int:
    """Searches over the space of the config; 0. ConfigError, one line, for what the user can mend."""
    from pipeline.search_check import check_search

    folder = run_folder(config)
    check_search(config, folder)
    check_unchanged(config, folder)
    refuse_if_held(folder)
    check_model(config)
    from pipeline.prepare import prepare, wanted_packs

    wanted = wanted_packs(config)
    with ray_session(config):
        from pipeline.search import search
        from pipeline.storage_probe import check_all_nodes

        check_all_nodes(config)
        packs = prepare(config, wanted)
        search(config, folder, packs)
    return 0


def check_model(config: Config) -> None:
    """ConfigError if the model cannot be built or does not fit its tokenizer; shapes only, no weights are read."""
    from longlora.adapters import trainable_report
    from longlora.model import check_vocabulary
    from pipeline.models import build_model, scaling_note, tokenizer_of

    source = local_path(config.model.tokenizer_source)
    try:
        tokenizer = tokenizer_of(config)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.tokenizer = {source!r}: no tokenizer can be loaded ({reason})") from None
    try:
        model = build_model(config, device="meta")
        check_vocabulary(model.network.config, len(tokenizer))
    except ValueError as error:
        raise ConfigError(f"model {config.model.base or 'architecture'}: {error}") from None
    for line in (f"model: {trainable_report(model)}", scaling_note(config)):
        if line:
            print(line, flush=True)


def _prepare_and_train(config: Config, folder: UPath, train: bool) -> None:
    from pipeline.prepare import prepare, wanted_packs

    wanted = wanted_packs(config)  # before Ray starts: a missing file is found in a second
    with ray_session(config):
        from pipeline.storage_probe import check_all_nodes

        check_all_nodes(config)
        if not train:
            prepare(config, wanted)
            return
        from pipeline import capacity, train_driver

        capacity.check_resources(config)
        capacity.check_memory(config)
        train_driver.train(config, folder, prepare(config, wanted))


def _evaluate(config: Config, folder: UPath) -> None:
    from pipeline.evaluation import evaluate
    from pipeline.tracking import deliver

    deliver(config, folder, run_where_the_gpus_are(config, evaluate, config, folder))


def audit(config: Config, folder: UPath, as_json: bool) -> int:
    """Audits a run, which may be going on; 0, or 1 if something was found. as_json: prints that and nothing else."""
    from rich.console import Console

    from pipeline.audit import audit_run
    from pipeline.audit_report import audit_json, audit_table, write_report

    result = audit_run(config, folder)
    written = write_report(folder, result)
    if as_json:
        print(json_bytes(audit_json(result)).decode(), end="")
    else:
        Console().print(audit_table(result))
        print(f"written to {written}")
    return 0 if result.whole else 1

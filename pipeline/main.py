"""The command line: parse, load the config, dispatch. Nothing heavy is imported before a command needs it.

python pipeline/main.py [COMMAND] [--config FILE] [section.key=value …]
python pipeline/main.py audit RUN_DIR
python pipeline/main.py compare [NAME_OR_ID …]
python pipeline/main.py plan [--gpu NAME] [--sweep KEY=A,B,…]
"""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

# With `python pipeline/main.py` Python puts this folder first on the path, where a file could hide an installed
# module of its name. The repository root takes its place: both packages import from there, in any working directory.
ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [ROOT, *(entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent)]

from pipeline import plan_command  # noqa: E402
from pipeline.compare import add_arguments, compare  # noqa: E402
from pipeline.config import Config, ConfigError, load_config  # noqa: E402

STAGES = {
    "run": "prepare → train → evaluate → export; goes on where it stopped (default)",
    "prepare": "tokenise and pack the documents",
    "train": "train to the last step, from the newest checkpoint",
    "evaluate": "perplexity of base, extended base and trained model, with plots",
    "export": "write the trained model as a Hugging Face folder",
    "search": "try the settings of search.space, each as a training run; write the best config, a table and plots",
    "audit": "prove that every sequence was trained once, in order, and show where the time went; exit 1 if not",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="main.py",
        description="Extend the context of an open LLM with S²-Attn and LoRA, on a cluster that changes.",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in STAGES.items():
        stage = commands.add_parser(name, help=text, description=text)
        if name == "audit":
            stage.add_argument("run", nargs="?", metavar="RUN_DIR", help="folder or URI (default: the config's run)")
            stage.add_argument("--json", action="store_true", help="print the findings as JSON and nothing else")
        stage.add_argument("--config", metavar="FILE", help="YAML file (default: configs/quickstart.yaml)")
        stage.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    planning = "memory, time and cost of a run before anything is started; exit 1 if it does not fit"
    plan_command.add_arguments(commands.add_parser("plan", help=planning, description=planning))
    comparing = "runs that MLflow has, side by side: settings that differ, metrics, and a page of plots"
    add_arguments(commands.add_parser("compare", help=comparing, description=comparing))
    generate = commands.add_parser("generate", help="text from a base, adapter or exported model")
    generate.add_argument(
        "--model", required=True, help="Hugging Face folder or name, a run's folder, or a checkpoint folder of a run"
    )
    generate.add_argument("--prompt", required=True, help="the text to continue, or @FILE")
    generate.add_argument("--max-new-tokens", type=int, default=200)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    generate.add_argument("--seed", type=int, default=0)
    return top


def main(arguments: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (
        arguments[0] not in (*STAGES, "plan", "compare", "generate") and arguments[0] not in ("-h", "--help")
    ):
        arguments.insert(0, "run")
    options = parser().parse_args(arguments)
    _quiet_libraries()
    try:
        if options.command == "generate":
            _generate(options)
        elif options.command == "compare":
            compare(options)
        elif options.command == "plan":
            return plan_command.plan(options)
        elif options.command == "audit":
            return _audit(options)
        else:
            from pipeline.stages import run_search, run_stages

            config = _absolute_paths(load_config(options.config, options.overrides))
            return run_search(config) if options.command == "search" else run_stages(config, options.command)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        from pipeline.storage import storage_error

        if not storage_error(error):
            raise
        print(f"error: {storage_error(error)}", file=sys.stderr)
        return 2
    return 0


def _quiet_libraries() -> None:
    """Progress is ours to show; set before transformers and Ray are imported, here and (inherited) in the workers."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
    }.items():
        os.environ.setdefault(name, value)
    # DeepSpeed comes in with PEFT and tells of a machine without GPU that it has none.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    # PEFT asks transformers for it by its old name, which nobody here can change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def _audit(options: argparse.Namespace) -> int:
    from pipeline.run_config import run_config
    from pipeline.stages import audit
    from pipeline.storage import absolute_path, run_folder

    overrides = options.overrides
    if options.run and "=" in options.run and "/" not in options.run.partition("=")[0]:
        overrides, options.run = [options.run, *overrides], None
    if options.run is None:
        config = load_config(options.config, overrides)
        return audit(config, run_folder(config), options.json)
    if options.config or overrides:
        raise ConfigError(f"audit {options.run}: reads the settings of that run; leave out --config and other settings")
    folder = absolute_path(options.run)
    return audit(run_config(folder), folder, options.json)


def _generate(options: argparse.Namespace) -> None:
    from pipeline.generate import generate

    prompt = options.prompt
    if prompt.startswith("@"):
        try:
            prompt = Path(prompt[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt {prompt}: {error}") from None
    for piece in generate(options.model, prompt, options.max_new_tokens, options.temperature, options.seed):
        print(piece, end="", flush=True)
    print()


def _absolute_paths(config: Config) -> Config:
    """Paths that exist relative to the working directory become absolute; others stay relative to the repository."""

    def absolute(text: str) -> str:
        here = "://" not in text and not os.path.isabs(text) and Path.cwd() != Path(ROOT) and Path(text).exists()
        return str(Path(text).resolve()) if here else text

    model = config.model.model_copy(
        update={
            "base": config.model.base and absolute(config.model.base),
            "tokenizer": config.model.tokenizer and absolute(config.model.tokenizer),
        }
    )
    data = config.data.model_copy(
        update={
            "train": [absolute(text) for text in config.data.train],
            "validation": [absolute(text) for text in config.data.validation],
        }
    )
    return config.model_copy(update={"model": model, "data": data})


if __name__ == "__main__":
    sys.exit(main())

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM
from upath import UPath

from longlora.adapters import attach_adapter
from pipeline import checkpoints, storage
from pipeline.checkpoints import RunState
from pipeline.config import ConfigError
from pipeline.optimizer import Fragment, ParameterState
from pipeline.storage import NoAnswer

STATE = RunState(
    step=3, position=24, packs_fingerprint="p", base_fingerprint="b", training_hash="t", attempt=1, eval_loss=None
)


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )


def adapted() -> PeftModel:
    return attach_adapter(
        base(),
        rank=2,
        alpha=4,
        dropout=0.0,
        targets="auto",
        rslora=False,
        dora=False,
        train_embeddings=True,
        train_norms=True,
    )


def random_state(network: Any) -> dict[str, ParameterState]:
    torch.manual_seed(1)
    return {
        name: ParameterState(*(torch.randn(parameter.shape) for _ in range(3)))
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


@pytest.fixture
def network() -> PeftModel:
    return adapted()


@pytest.mark.parametrize("make", [adapted, base], ids=["lora", "full"])
def test_what_is_saved_is_restored_bit_by_bit(tmp_path: Any, make: Any) -> None:
    network = make()
    parameters = random_state(network)
    folder = checkpoints.save(UPath(tmp_path), STATE, network, parameters)
    assert checkpoints.newest(UPath(tmp_path)) == folder
    assert checkpoints.read_state(folder) == STATE
    restored = checkpoints.read_parameters(folder, network)
    assert restored.keys() == parameters.keys()
    for name, state in parameters.items():
        for part in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(restored[name], part), getattr(state, part)), (name, part)


def test_the_same_calls_work_on_an_object_store(network: PeftModel) -> None:
    run = UPath("memory://bucket/checkpoints-test")
    parameters = random_state(network)
    folder = checkpoints.save(run, STATE, network, parameters)
    assert checkpoints.newest(run) == folder
    restored = checkpoints.read_parameters(folder, network)
    assert all(torch.equal(restored[name].exp_avg, state.exp_avg) for name, state in parameters.items())


def test_peft_loads_the_adapter_with_the_trained_weights(tmp_path: Any, network: PeftModel) -> None:
    parameters = random_state(network)
    folder = checkpoints.save(UPath(tmp_path), STATE, network, parameters)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in parameters:
                parameter.copy_(parameters[name].master)
    loaded = PeftModel.from_pretrained(base(), str(folder))
    ids = torch.arange(12)[None]
    assert torch.equal(loaded(ids).logits, network.eval()(ids).logits)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Any, network: PeftModel) -> None:
    run = UPath(tmp_path)
    checkpoints.save(run, STATE, network, random_state(network))
    later = checkpoints.save(run, replace(STATE, step=6), network, random_state(network))
    (later / "manifest.json").unlink()
    assert checkpoints.steps(run) == [3]
    assert checkpoints.newest(run) == run / "checkpoints" / "step-3"


def damaged_files() -> list[tuple[str, Any]]:
    return [
        ("truncated", lambda data: data[:-1]),
        ("bit flipped", lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:]),
        ("empty", lambda data: b""),
    ]


@pytest.mark.parametrize(("_how", "change"), damaged_files())
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer-1-of-1.safetensors", "state.json"])
def test_restore_walks_back_over_damaged_checkpoints(
    tmp_path: Any, network: PeftModel, name: str, _how: str, change: Any
) -> None:
    run = UPath(tmp_path)
    good = checkpoints.save(run, STATE, network, random_state(network))
    bad = checkpoints.save(run, replace(STATE, step=6), network, random_state(network))
    (bad / name).write_bytes(change((bad / name).read_bytes()))
    assert name in checkpoints.damage(bad)
    assert checkpoints.newest(run) == good


def test_a_checkpoint_that_cannot_be_read_now_is_neither_passed_over_nor_deleted(
    tmp_path: Any, network: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = UPath(tmp_path)
    older = checkpoints.save(run, STATE, network, random_state(network))
    newest = checkpoints.save(run, replace(STATE, step=6), network, random_state(network))

    def answers_not(path: UPath) -> Any:
        if newest in path.parents:
            raise NoAnswer("the store does not answer")
        return storage.read_json(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "read_json", answers_not)
        with pytest.raises(NoAnswer):
            checkpoints.newest(run)
        with pytest.raises(NoAnswer):
            checkpoints.discard_uncommitted(run, older)
        assert checkpoints.retain(run, keep_last=1, keep_best=0) == []
    assert checkpoints.newest(run) == newest and checkpoints.steps(run) == [3, 6]


def test_a_missing_file_and_a_foreign_manifest_are_damage(tmp_path: Any, network: PeftModel) -> None:
    run = UPath(tmp_path)
    folder = checkpoints.save(run, STATE, network, random_state(network))
    (folder / "config.json").unlink()
    assert "config.json" in checkpoints.damage(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": 99, "files": {}}))
    (folder / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ConfigError, match="format 99, this version reads 2; go on with the version that wrote it"):
        checkpoints.newest(run)
    assert checkpoints.discard_uncommitted(run) == [], "what another version wrote is not ours to delete"
    (folder / "manifest.json").write_text("{")
    assert checkpoints.newest(run) is None


def test_saving_again_replaces_what_a_crash_left(tmp_path: Any, network: PeftModel) -> None:
    run = UPath(tmp_path)
    left = run / "checkpoints" / "step-3"
    left.mkdir(parents=True)
    (left / "optimizer-1-of-2.safetensors").write_bytes(b"half")
    folder = checkpoints.save(run, STATE, network, random_state(network))
    assert not (folder / "optimizer-1-of-2.safetensors").exists()
    assert checkpoints.damage(folder) == ""


def test_what_cannot_be_restored_is_cleared_away(tmp_path: Any, network: PeftModel) -> None:
    run = UPath(tmp_path)
    good = checkpoints.save(run, STATE, network, random_state(network))
    damaged = checkpoints.save(run, replace(STATE, step=6), network, random_state(network))
    (damaged / "state.json").write_bytes(b"{}")
    uncommitted = checkpoints.save(run, replace(STATE, step=9), network, random_state(network))
    (uncommitted / "manifest.json").unlink()
    assert checkpoints.discard_uncommitted(run) == [6, 9]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [good.name]
    checkpoints.save(run, replace(STATE, step=6), network, random_state(network))


def test_what_is_older_than_the_restored_checkpoint_is_not_read_again(
    tmp_path: Any, network: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = UPath(tmp_path)
    for step in (3, 6, 9):
        checkpoints.save(run, replace(STATE, step=step), network, random_state(network))
    (run / "checkpoints" / "step-3" / "config.json").unlink()
    (run / "checkpoints" / "step-9" / "config.json").write_bytes(b"{}")
    restored = checkpoints.newest(run)
    monkeypatch.setattr(checkpoints, "file_digest", None)
    assert checkpoints.discard_uncommitted(run, restored) == [3, 9], "sizes tell"


def test_a_step_is_committed_once(tmp_path: Any, network: PeftModel) -> None:
    folder = checkpoints.save(UPath(tmp_path), STATE, network, random_state(network))
    manifest = (folder / "manifest.json").read_bytes()
    with pytest.raises(RuntimeError, match="committed by another writer"):
        checkpoints.commit(folder, {})
    assert (folder / "manifest.json").read_bytes() == manifest


def test_a_moment_with_a_gap_is_refused(tmp_path: Any, network: PeftModel) -> None:
    parameters = random_state(network)
    folder = checkpoints.save(UPath(tmp_path), STATE, network, parameters)
    pieces = {name: Fragment(1, ParameterState(*[p.flatten()[1:] for p in (s.master, s.exp_avg, s.exp_avg_sq)]))
              for name, s in parameters.items()}  # fmt: skip
    with pytest.raises(RuntimeError, match="written by another writer"):
        checkpoints.write_fragments(folder, network, pieces, 0, 1)
    (folder / "optimizer-1-of-1.safetensors").unlink()
    checkpoints.write_fragments(folder, network, pieces, 0, 1)
    with pytest.raises(ConfigError, match=r"optimizer's state of .* is incomplete"):
        checkpoints.read_parameters(folder, network)


def test_the_last_and_the_best_are_kept(tmp_path: Any, network: PeftModel) -> None:
    run = UPath(tmp_path)
    for step, loss in [(1, 2.0), (2, 1.0), (3, 3.0), (4, None), (5, 1.5)]:
        checkpoints.save(run, replace(STATE, step=step, eval_loss=loss), network, random_state(network))
    assert checkpoints.retain(run, keep_last=2, keep_best=1) == [1, 3]
    assert checkpoints.steps(run) == [2, 4, 5]


def test_other_data_or_another_base_are_refused_with_the_reason() -> None:
    checkpoints.check_resumable(STATE, "p", "b")
    with pytest.raises(ConfigError, match=r"the packs differ .*\(p then, q now\)"):
        checkpoints.check_resumable(STATE, "q", "b")
    with pytest.raises(ConfigError, match="the base weights differ"):
        checkpoints.check_resumable(STATE, "p", "c")


def test_the_base_fingerprint_follows_the_weights_not_the_place(tmp_path: Any) -> None:
    base().save_pretrained(tmp_path / "one")
    base().save_pretrained(tmp_path / "two")
    assert checkpoints.base_fingerprint(str(tmp_path / "one")) == checkpoints.base_fingerprint(str(tmp_path / "two"))
    file = tmp_path / "two" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert checkpoints.base_fingerprint(str(tmp_path / "one")) != checkpoints.base_fingerprint(str(tmp_path / "two"))


def test_a_full_disk_leaves_no_commit(tmp_path: Any, network: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = UPath(tmp_path)
    good = checkpoints.save(run, STATE, network, random_state(network))
    written = checkpoints.create_once

    def fills_up(path: UPath, *data: bytes) -> bool:
        if path.name == "state.json":
            raise OSError(28, "No space left on device")
        return written(path, *data)

    monkeypatch.setattr(checkpoints, "create_once", fills_up)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(run, replace(STATE, step=6), network, random_state(network))
    assert checkpoints.newest(run) == good

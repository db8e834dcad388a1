"""Loggers: every number once, in whatever number of parts a run was trained; and none of them ends a run."""

from __future__ import annotations

import os
import resource

import pytest
from children import Child
from recording_logger import RecordingLogger

from trifuse.architectures.storage.run_loggers import LOGGERS, MLflowLogger, TensorBoardLogger, started
from trifuse.kernels import errors
from trifuse.kernels.errors import MissingExtra, TrifuseError

CONFIGURATION = {"recipe": {"epochs": 3, "lr": 1e-3}, "config": {"data": {"a:b": [1, 2]}}, "training_samples": 7}


def rows(first, last):
    return [{"epoch": n, "step": 10 * n, "loss": 0.1 * n, "val_dice (%)": 0.5} for n in range(first, last + 1)]


def log(out, logger, first, last, *, epochs_done=None, say=lambda line: None):
    """Log some epochs, as one part of a run."""
    with started([logger], out, CONFIGURATION, first - 1 if epochs_done is None else epochs_done, say) as loggers:
        for row in rows(first, last):
            loggers.log(row)


def board(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


@pytest.mark.parametrize("killed_in", [1, 2])
def test_t16_tensorboard_gets_every_number_once(tmp_path, killed_in):
    """A run that is killed after it logged an epoch, and before its checkpoint, runs that epoch once more."""
    pytest.importorskip("tensorboard")
    log(tmp_path, TensorBoardLogger(), 1, killed_in)
    log(tmp_path, TensorBoardLogger(), killed_in, 3)
    events = board(tmp_path)
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
    ]
    assert [event.step for event in events.Scalars("step")] == [1, 2, 3]
    (text,) = events.Tensors("configuration/text_summary")
    assert '"lr": 0.001' in text.tensor_proto.string_val[0].decode()


def test_a_row_can_be_seen_while_the_run_goes_on(tmp_path):
    pytest.importorskip("tensorboard")
    with started([TensorBoardLogger()], tmp_path, CONFIGURATION, 0, print) as loggers:
        for epoch, row in enumerate(rows(1, 3), start=1):
            loggers.log(row)
            assert [event.step for event in board(tmp_path).Scalars("loss")][-1] == epoch


def test_mlflow_gets_every_number_once(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    out = tmp_path / "a run"
    out.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log(out, MLflowLogger(), 1, 2)
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow/mlflow.db")
    log(out, MLflowLogger(), 2, 3)  # the second epoch once more, as after a kill
    experiment = client.get_experiment_by_name("trifuse")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "a run"
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "recipe.epochs": "3",
        "recipe.lr": "0.001",
        "config.data.a_b": "[1, 2]",
        "training_samples": "7",
    }
    for name, values in (("loss", [0.1, 0.2, 0.1 * 3]), ("step", [10, 20, 30]), ("val_dice ___", [0.5] * 3)):
        history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda metric: metric.step)
        assert [(metric.step, metric.value) for metric in history] == list(enumerate(values, start=1))
    assert {path.name for path in (out / "mlflow").iterdir()} == {"mlflow.db", "run_id"}
    assert {path.name for path in tmp_path.iterdir()} == {"a run"}
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_mlflow_is_kept_where_its_own_variables_say(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/team.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "atria")
    many = {f"field_{number}": number for number in range(250)}  # more than MLflow takes at once
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with pytest.raises(KeyError), started([MLflowLogger()], tmp_path / name, many, 0, print):
            raise KeyError
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([client.get_experiment_by_name("atria").experiment_id])
    assert sorted((run.info.run_name, run.info.status) for run in runs) == [("one", "KILLED"), ("two", "KILLED")]
    assert [len(run.data.params) for run in runs] == [250, 250]
    assert not (tmp_path / "one/mlflow/mlflow.db").exists()


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("tensorboard", "tensorboard", "tb"), ("mlflow", "mlflow", "mlflow"), ("mlflow", "alembic", "mlflow")],
)
def test_l6_a_missing_package_is_named_when_a_logger_is_made(monkeypatch, name, package, extra):
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(MissingExtra, match=rf"needs {package}.*pip install 'trifuse\[{extra}\]'"):
        LOGGERS[name]()


@pytest.mark.parametrize("fails_at", [2, 3], ids=["in its first row", "in its second row"])
def test_one_that_fails_is_left_out_and_named_once(tmp_path, fails_at):
    said, whole, broken = [], RecordingLogger(), RecordingLogger("broken", fails_at)
    with started([broken, whole], tmp_path, CONFIGURATION, 0, said.append) as loggers:
        for row in rows(1, 3):
            loggers.log(row)
    assert whole.calls == [("start", tmp_path, CONFIGURATION, 0), *[("log", n) for n in (1, 2, 3)], ("close", True)]
    assert broken.calls[fails_at - 1 :] == [("log", fails_at - 1), ("close", False)]
    assert len(said) == 1
    assert said[0].startswith("broken failed, and gets nothing more of this run (nobody listens)")


def test_one_that_fails_at_its_end_is_no_error(tmp_path):
    said, broken = [], RecordingLogger("broken", 2)
    with started([broken], tmp_path, CONFIGURATION, 0, said.append):
        pass
    assert len(said) == 1


def test_one_that_cannot_begin_is_an_error_and_the_others_are_closed(tmp_path):
    first, broken, third = RecordingLogger(), RecordingLogger("broken", 1), RecordingLogger()
    with (
        pytest.raises(TrifuseError, match=r"broken cannot log to .*: nobody listens; or train without it"),
        started([first, broken, third], tmp_path, CONFIGURATION, 0, print),
    ):
        pass
    assert first.calls[-1] == ("close", False)
    assert third.calls == []


def test_a_full_disk_costs_tensorboard_and_no_run(tmp_path):
    pytest.importorskip("tensorboard")

    def child():
        said, whole = [], RecordingLogger()
        with started([TensorBoardLogger(), whole], tmp_path, CONFIGURATION, 0, said.append) as loggers:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            for row in rows(1, 30):
                loggers.log(row)
        assert [call[0] for call in whole.calls] == ["start", *["log"] * 30, "close"]
        (line,) = said
        assert "tensorboard failed" in line
        assert "too large" in line

    assert Child(child).wait() == 0

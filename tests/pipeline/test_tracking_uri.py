import pytest

from pipeline.config import ConfigError, parse_config
from pipeline.tracking_uri import check_tracking_uri, how_to_look


@pytest.mark.parametrize(
    "uri",
    [
        "http://localhost:5000",
        "https://mlflow.example.com/prefix",
        "http://[::1]:5000",
        "sqlite:///mlflow.db",
        "sqlite:////home/me@work/a:b/mlflow.db",
        "postgresql+psycopg2://me@db.example.com:5432/mlflow",
        "databricks",
        "databricks://profile",
    ],
)
def test_these_are_usable(uri: str) -> None:
    check_tracking_uri(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "localhost:5000",
        "htp://localhost:5000",
        "http://",
        "http://localhost:port",
        "http://localhost:70000",
        "http://[::1",
        "http://my host",
        "mlruns",
        "file:///tmp/mlruns",
        "",
    ],
)
def test_these_are_not_and_the_line_says_what_is(uri: str) -> None:
    with pytest.raises(ValueError, match="give a server") as caught:
        check_tracking_uri(uri)
    assert repr(uri) in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:hunter2@localhost:5000",
        "https://hunter2@localhost",
        "http://me:hunter2/3@localhost",
        "postgresql://me:hunter2@db/mlflow",
        "postgresql://db/mlflow?user=me&password=hunter2",
        "HTTP://me:hunter2@[::1",
        "mysql+pymysql://db/mlflow?passwd=hunter2",
        "mssql+pyodbc:///?odbc_connect=Driver%3DODBC%3BUID%3Dme%3BPWD%3Dhunter2",
    ],
)
def test_credentials_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        check_tracking_uri(uri)
    assert "hunter2" not in str(caught.value)


def test_a_config_with_such_a_uri_is_refused() -> None:
    values = {
        "run": {"name": "secret"},
        "model": {"base": "some/model"},
        "context": {"length": 100},
        "attention": {"group_size": 20},
        "data": {"train": ["books"]},
        "optimization": {"steps": 8, "global_batch": 2, "warmup_steps": 0},
        "tracking": {"uri": "http://me:hunter2@localhost:5000"},
    }
    with pytest.raises(ConfigError, match=r"^tracking.uri carries credentials") as caught:
        parse_config(values)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("http://mlflow.example.com:5000", "MLflow: http://mlflow.example.com:5000"),
        ("sqlite:////home/me/mlflow.db", "MLflow: mlflow ui --backend-store-uri sqlite:////home/me/mlflow.db   then "),
        ("databricks://profile", "MLflow: the Databricks workspace"),
    ],
)
def test_one_line_tells_how_to_open_it(uri: str, line: str) -> None:
    assert how_to_look(uri).startswith(line) and "\n" not in how_to_look(uri)

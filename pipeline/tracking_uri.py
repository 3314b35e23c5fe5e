"""Which tracking URIs MLflow can use, and none that carries a secret; known without importing MLflow."""

import re
from importlib.metadata import entry_points
from urllib.parse import unquote, urlsplit

SCHEMES = ("http", "https", "databricks", "sqlite", "postgresql", "mysql", "mssql")


def check_tracking_uri(uri: str) -> None:
    """ValueError if it carries credentials, which would be written wherever the config is, or is no tracking URI."""
    if _has_credentials(uri):
        raise ValueError(
            "tracking.uri carries credentials, which would be written to config.yaml and to MLflow; leave them out and "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or what the database reads (e.g. PGPASSWORD)"
        )
    if not _is_usable(uri):
        raise ValueError(
            f"tracking.uri = {uri!r}: give a server (http://host:5000), a database (sqlite:////folder/mlflow.db, "
            "postgresql://…, mysql://…, mssql://…) or databricks"
        )


def how_to_look(uri: str) -> str:
    """One line that tells how to open MLflow's pages on the runs of a tracking URI that can be used."""
    if uri.startswith("http"):
        return f"MLflow: {uri}"
    if uri.startswith("databricks"):
        return "MLflow: the Databricks workspace of this machine's settings"
    return f"MLflow: mlflow ui --backend-store-uri {uri}   then http://127.0.0.1:5000, which only this machine reaches"


def _has_credentials(uri: str) -> bool:
    """A password, or on a web server any user: tokens are given in its place."""
    user = uri.partition("://")[2].rpartition("@")[0]
    in_front = not user.startswith("/") and (":" in user or (user != "" and uri.lower().startswith("http")))
    return in_front or re.search(r"(password|passwd|pwd)=", unquote(uri), re.IGNORECASE) is not None


def _is_usable(uri: str) -> bool:
    if uri == "databricks":
        return True
    try:
        parts = urlsplit(uri)
        port_is_legal = parts.port != 0  # ValueError if it is no number, or too large
    except ValueError:
        return False
    web, scheme = parts.scheme in ("http", "https"), parts.scheme.split("+")[0]
    known = scheme in SCHEMES or scheme in {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}
    return known and port_is_legal and " " not in uri and (bool(parts.hostname) or not web)

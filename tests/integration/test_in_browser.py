"""What a browser shows of runs: our pages of a comparison and a search, MLflow's list. Needs Debian's Chromium."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from tracking_server import TrackingServer
from upath import UPath

from pipeline.config import load_config
from pipeline.main import main
from pipeline.search_budget import Budget
from pipeline.search_report import write_result
from pipeline.search_trials import Report, TrialRecord

WAIT_S = 120
"""For what takes seconds on an idle machine."""
FLAGS = (
    "--headless",
    "--no-sandbox",  # which Chromium cannot have as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium is not installed (on Debian: apt-get install chromium chromium-driver)")
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, log_runs: Callable[[str], None]) -> Path:
    """A folder with a database of runs."""
    folder = tmp_path_factory.mktemp("store")
    log_runs(f"sqlite:///{folder}/mlflow.db")
    return folder


@pytest.fixture(scope="module")
def page(store: Path) -> str:
    file = store / "comparison.html"
    arguments = ["--uri", f"sqlite:///{store}/mlflow.db", "--experiment", "mixed", "--html", str(file)]
    assert main(["compare", *arguments]) == 0
    return file.as_uri()


def first_column(browser: Chrome) -> list[str]:
    return [head.text for head in browser.find_elements(By.CSS_SELECTOR, "#runs tbody th")]


def test_the_page_shows_texts_and_plots(browser: Chrome, page: str) -> None:
    browser.get(page)
    assert browser.title == "Comparison of 5 runs", "no run's text was executed"
    assert first_column(browser)[:4] == ["search", "trial-0", "trial-1", "trainer"]
    assert first_column(browser)[4].startswith("<script>document.title = 'owned'</script><img src=x")
    table = browser.find_element(By.ID, "runs").text
    for text in ("attention.group_size", "2048", "3.0333", "36.50", "6,050", "23.00", "91.0%", "KILLED"):
        assert text in table
    figures = browser.find_elements(By.CSS_SELECTOR, ".plots figure")
    titles = [figure.find_element(By.TAG_NAME, "figcaption").text.splitlines()[0] for figure in figures]
    assert len(titles) == 10 and {"Training loss against tokens", "Perplexity by context length"} < set(titles)
    for figure in figures:
        assert figure.find_element(By.TAG_NAME, "svg").size["height"] > 150
        shapes = figure.find_elements(By.CSS_SELECTOR, '[id*="-run-"] path')
        assert shapes and all(len(shape.get_attribute("d") or "") > 10 for shape in shapes)
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]
    browser.set_window_size(700, 900)
    root = browser.find_element(By.TAG_NAME, "html")
    assert root.get_property("scrollWidth") <= root.get_property("clientWidth"), "only the table scrolls sideways"


def test_the_table_sorts_and_lines_can_be_hidden(browser: Chrome, page: str) -> None:
    browser.get(page)
    by_loss = browser.find_element(By.XPATH, "//thead//button[text()='evaluation loss']")
    by_loss.click()
    order = ["trainer", "trial-0", "trial-1"]
    assert first_column(browser)[:3] == order and first_column(browser)[4] == "search", "without a value it is last"
    by_loss.click()
    assert first_column(browser)[1:4] == order[::-1] and first_column(browser)[4] == "search"
    [box] = browser.find_elements(By.XPATH, "//fieldset//label[contains(., 'trainer')]/input")
    line = browser.find_element(By.CSS_SELECTOR, '.plots [id$="-run-3"]')
    assert line.is_displayed()
    box.click()
    assert not line.is_displayed()
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]


def test_the_page_of_a_search(browser: Chrome, tmp_path: Path) -> None:
    config = load_config("configs/search-demo.yaml")
    hostile = "<script>document.title = 'owned'</script>"
    records = [
        TrialRecord(
            number,
            f"search-demo.{number:04d}",
            {"attention.group_size": group_size, "adapter.rank": 8},
            status,
            hostile,
            reports=[Report(12, 98304, loss, 1000.0 - group_size / 4)],
        )
        for number, group_size, status, loss in (
            (1, 512, "finished", 4.3),
            (2, 1024, "stopped", 4.6),
            (3, 2048, "finished", 4.2),
        )
    ]
    folder = write_result(config, UPath(tmp_path), records, Budget(config, UPath(tmp_path)))
    browser.get(Path(str(folder / "report.html")).as_uri())
    assert browser.title == "Search search-demo", "no trial's text was executed"
    rows = [row.text for row in browser.find_elements(By.CSS_SELECTOR, "tbody tr")]
    assert [row.split()[0] for row in rows] == ["3", "1", "2"] and "4.2000" in rows[0] and hostile in rows[2]
    for figure in browser.find_elements(By.TAG_NAME, "figure"):
        assert figure.find_element(By.TAG_NAME, "svg").size["height"] > 150
        assert len(figure.find_elements(By.CSS_SELECTOR, "svg path")) > 10
    assert len(browser.find_elements(By.TAG_NAME, "figure")) == 2
    assert "group_size: 2048" in browser.find_element(By.TAG_NAME, "pre").text
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]


def test_mlflows_own_pages_list_the_runs(browser: Chrome, store: Path) -> None:
    """The children of a run are folded into it, until its first button is pressed."""
    server = TrackingServer(store)
    server.start()
    try:
        browser.get(f"{server.uri}/#/experiments/1/runs")
        wait = WebDriverWait(browser, WAIT_S)
        row = "//*[@role='row'][.//a[normalize-space()='{}']]"
        for name in ("trainer", "search"):
            wait.until(lambda driver, name=name: driver.find_elements(By.XPATH, row.format(name)))
        wait.until(lambda driver: driver.find_elements(By.XPATH, row.format("search") + "//button"))[0].click()
        for name in ("trial-0", "trial-1"):
            wait.until(lambda driver, name=name: driver.find_elements(By.XPATH, row.format(name)))
    finally:
        server.kill()

"""What a person sees in Prefect, in a real browser: the page of a night, its artifacts, a form that refuses."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.cluster.conftest import Nights, put_images, wait_for

FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
FLAGS += ("disable-component-update", "disable-sync", "window-size=1400,1800")


class Pages:
    """A browser, logged in."""

    def __init__(self, nights: Nights, driver: webdriver.Chrome) -> None:
        self.driver, self._url = driver, nights.site.prefect_url
        self.driver.get(f"{self._url}/dashboard")
        wait_for(lambda: "login" in self.driver.current_url, 60)
        secret = base64.b64encode(nights.site.secret("prefect-password").encode()).decode()
        self.driver.execute_script("localStorage.setItem('prefect-password', arguments[0])", secret)

    def open(self, path: str, until: str) -> str:
        """Go to a page and wait for a word on it; its text."""
        self.driver.get(f"{self._url}/{path}")
        wait_for(lambda: until in self.text, 60, lambda: self.text)
        return self.text

    @property
    def text(self) -> str:
        """What can be read on the page."""
        return self.driver.find_element(By.TAG_NAME, "body").text

    def click(self, words: str) -> None:
        """Click on the innermost thing that has these words and no others."""
        found = self.driver.find_elements(By.XPATH, f"//*[normalize-space(.)='{words}']")
        self.driver.execute_script("arguments[0].click()", found[-1])


@pytest.fixture(scope="module")
def pages(nights: Nights) -> Iterator[Pages]:
    """Debian's Chromium and its driver (packages chromium and chromium-driver)."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("there is no browser: install Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    there = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield Pages(nights, there)
    finally:
        there.quit()


@pytest.fixture(scope="module")
def night(nights: Nights, models: str) -> str:
    """A finished archive run over a few images."""
    put_images("s3://archive/pages", 12)
    config = {"models": models, "input": "s3://archive/pages", "output": "s3://output/pages"}
    run = nights.start("archive", config)
    assert nights.ended(run)["type"] == "COMPLETED", nights.log(run)
    return run


def test_the_page_of_a_night_says_how_it_went(pages: Pages, night: str, tmp_path: Path) -> None:
    text = pages.open(f"runs/flow-run/{night}", "Finished in state")
    pages.driver.save_screenshot(tmp_path / "run.png")
    assert "Completed" in text
    assert "predict: started unetpp-predict-" in text
    assert "12 listed = 12 predicted + 0 failed + 0 unchanged" in text


def test_the_artifacts_of_a_night_are_on_its_page(pages: Pages, night: str) -> None:
    pages.open(f"runs/flow-run/{night}", "Finished in state")
    pages.click("Artifacts")
    wait_for(lambda: "ray-job" in pages.text.lower(), 60, lambda: pages.text)
    text = pages.text.lower()
    for key in ("archive", "progress", "report"):
        assert key in text


def test_the_form_describes_every_parameter_and_refuses_a_bad_value(pages: Pages, nights: Nights, night: str) -> None:
    deployment = nights.deployment("archive")["id"]
    text = pages.open(f"deployments/deployment/{deployment}/run", "Deadline Hours")
    assert "when a flow stops its job" in text
    assert text.index("Input") < text.index("Deadline Hours")  # the work first
    before = number_of_runs(nights)

    labels = pages.driver.find_elements(By.XPATH, "//label[contains(., 'Deadline Hours')]//input") or (
        pages.driver.find_elements(By.XPATH, "//*[contains(text(), 'Deadline Hours')]/following::input[1]")
    )
    labels[0].send_keys(Keys.CONTROL, "a")
    labels[0].send_keys("-1")
    pages.click("Submit")
    wait_for(lambda: "minimum" in pages.text, 30, lambda: pages.text)
    assert f"deployments/deployment/{deployment}/run" in pages.driver.current_url
    assert number_of_runs(nights) == before


def number_of_runs(nights: Nights) -> int:
    wanted: dict[str, Any] = {"deployments": {"name": {"any_": ["archive"]}}}
    return int(nights.ask("POST", "/flow_runs/count", json=wanted))

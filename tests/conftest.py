import json
import shutil

import pytest
from hypothesis import HealthCheck, settings

# Random tests are the same every time; `make test-all` tries more examples.
settings.register_profile(
    "few",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("many", settings.get_profile("few"), max_examples=500)
settings.load_profile("few")

# Colours at the end of a transition, not on their way from one scheme to the other.
STILL = "document.head.insertAdjacentHTML('beforeend', '<style>* { transition: none !important }</style>')"


@pytest.fixture(scope="session")
def browser():
    """Debian's chromium, driven by selenium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(300)
    yield driver
    driver.quit()


@pytest.fixture
def complaints(browser):
    """What axe has against a page, all of its rules, as a desktop and a telephone show it, light and dark."""
    axe = pytest.importorskip("axe_core_python.selenium", reason="axe-core-python is not installed").Axe()

    def found(address, ready=lambda _: None):
        said = {}
        for width, mobile in ((1280, False), (390, True)):
            size = {"width": width, "height": 850, "deviceScaleFactor": 1, "mobile": mobile}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(address)
            ready(browser)
            browser.execute_script(STILL)
            for scheme in ("light", "dark"):
                browser.execute_cdp_cmd(
                    "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
                )
                browser.execute_script("document.documentElement.dataset.theme = arguments[0]", scheme)  # the book's
                for each in axe.run(browser)["violations"]:
                    said[width, scheme, each["id"]] = [node["html"][:200] for node in each["nodes"]]
            if browser.execute_script("return document.documentElement.scrollWidth > arguments[0]", width):
                said[width, "scrolls sideways"] = browser.title
        return said

    yield found
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """An empty machine; gives a maker of small models under published names, with random weights given as theirs."""
    import open_clip
    from safetensors.torch import save_file

    from upclose import identity
    from upclose.encode import published

    for name in ("CACHE", "DATA", "RESULTS"):
        monkeypatch.setenv(f"UPCLOSE_{name}", str(tmp_path / name.lower()))
    monkeypatch.delenv("UPCLOSE_BANK", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    configs, startup = tmp_path / "configs", tmp_path / "ipython" / "profile_default" / "startup"
    configs.mkdir()
    startup.mkdir(parents=True)  # what every kernel does before its first cell
    (startup / "00.py").write_text(f"import open_clip\nopen_clip.add_model_config(r'{configs}')\n")

    def shrink(name, pretrained, config):
        (configs / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(configs)
        state = open_clip.create_model(name, pretrained_text=False).state_dict()
        save_file({key: value.clone() for key, value in state.items()}, tmp_path / "random.safetensors")
        published.keep(name, pretrained, tmp_path / "random.safetensors")

    identity._weights.cache_clear()
    yield shrink
    identity._weights.cache_clear()

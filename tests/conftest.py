"""Tests leave no traces outside their own folders, and never wait for the network."""

import os

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    os.environ["DPO_KIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def pytest_configure(config):
    """`make test` gives the same answer every time; the slow tests search for new cases."""
    if "not slow" in config.getoption("-m"):
        settings.load_profile("repeatable")

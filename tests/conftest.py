"""Tests leave no traces outside their own folders, and never wait for the network."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    os.environ["DPO_KIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))

"""Which files begin: the longest, so that none of them is left alone in the end."""

import pytest

LONGEST = (
    "test_ray_engine",
    "test_onnx_export",
    "test_train",
    "test_demo",
    "test_recipe",
    "test_bench",
    "test_cli",
    "test_workers",
    "test_storage_admin",
    "test_processes",
)
"""Of a minute or more where several run at a time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))

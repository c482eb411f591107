"""What all tests share: one thread, and which files begin: the longest, so that none is left alone in the end."""

from collections.abc import Iterator

import pytest
import torch

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
"""Of most of a minute or more where several run at a time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small lose time by being shared between threads, most where other tests keep the cores busy.

    So it is in processes that tests start.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)

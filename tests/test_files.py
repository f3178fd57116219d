"""Files and folders that appear whole, readable by those whom the user's umask lets read."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minitron.files import whole_file, whole_folder


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def permissions(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_files_and_folders_have_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    with whole_file(tmp_path / "one.safetensors") as staging:
        save_file({"a": torch.zeros(2)}, staging)
        staging.chmod(0o600)  # as some versions of safetensors leave it
    with whole_folder(tmp_path / "folder") as staging:
        (staging / "inner").mkdir(mode=0o700)
        (staging / "inner" / "file").touch(mode=0o600)
    assert permissions(tmp_path / "one.safetensors") == 0o666 & ~umask
    assert permissions(tmp_path / "folder" / "inner" / "file") == 0o666 & ~umask
    assert permissions(tmp_path / "folder" / "inner") == 0o777 & ~umask
    assert permissions(tmp_path / "folder") == 0o777 & ~umask

"""Uploads a student to the Hugging Face Hub."""

import logging
from pathlib import Path
from typing import Any

from minitron.errors import UserError


def push(folder: Path, repo: str, *, private: bool = False, endpoint: str | None = None) -> str:
    """Upload the student of a run directory, or a model folder, with its card to `repo` (`owner/name`).

    Returns the address of the commit.

    Raises:
        UserError: there is no student, the Hub cannot read its card, or the Hub refuses the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    student = folder / "student" if (folder / "run.json").is_file() else folder
    if not (student / "config.json").is_file():
        raise UserError(f"{student} holds no model yet")
    if (student / "README.md").is_file():
        require_valid_card(student)
    else:
        logging.warning(f"{student} holds no README.md: the hub will show no model card")
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=student,
            commit_message="Pruned and distilled with Minitron",
            ignore_patterns=[".*", "metrics.jsonl", "tensorboard/*"],
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise UserError(f"the hub refused {repo}: {' '.join(str(error).split())}") from error
    return str(commit.commit_url)


def require_valid_card(folder: Path) -> Any:
    """Return the metadata of the folder's model card, as huggingface_hub reads it.

    Raises:
        UserError: the folder has no card, or huggingface_hub cannot read it.
    """
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        raise UserError(f"{folder} holds no README.md, the model card that the hub shows")
    try:
        return ModelCard.load(path).data
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} must be a model card that the hub can read: {' '.join(str(error).split())}") from error

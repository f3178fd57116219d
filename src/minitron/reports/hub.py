"""A student to the Hugging Face Hub."""

from pathlib import Path
from typing import Any

from minitron.errors import UserError


def push(run: Path, repo: str, private: bool = False, endpoint: str | None = None) -> str:
    """Upload a run's student, or a model folder, with its card to `repo`; return the address of the commit.

    Raises:
        UserError: there is no student, its card is not one that the Hub accepts, or the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    folder = run / "student" if (run / "run.json").is_file() else run
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model yet")
    require_valid_card(folder)
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Pruned and distilled with Minitron",
            ignore_patterns=[".*", "metrics.jsonl", "tensorboard/*"],
        )  # fmt: skip
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise UserError(f"the hub did not take {repo}: {' '.join(str(error).split())}") from error
    return str(commit.commit_url)


def require_valid_card(folder: Path) -> Any:
    """The metadata of the folder's card, read back as huggingface_hub reads it.

    Raises:
        UserError: there is no card, or it is none.
    """
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        raise UserError(f"{folder} holds no README.md, the card that the hub shows")
    try:
        return ModelCard.load(path).data
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no card that the hub can read: {' '.join(str(error).split())}") from error

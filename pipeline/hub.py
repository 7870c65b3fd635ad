"""A saved model to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from pipeline.errors import UserError
from pipeline.saved_model import demand_whole, saved_config


def push(directory: Path, repository: str, private: bool) -> str:
    """Upload a saved model's directory, its card included; returns its address. The token is HF_TOKEN's, or that of `hf auth login`.
    Raises UserError."""
    saved_config(directory)
    demand_whole(directory)
    try:
        api = HfApi()
        created = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=directory, commit_message="Sparse Expansion model")
        return str(created)
    except (*HfHubHTTPError.__bases__, ValueError) as error:  # OSError, those of the library that it speaks HTTP with, names it does not know
        raise UserError(f"--to {repository}: the hub refused it ({' '.join(str(error).split())[:200]}); set HF_TOKEN to a token that may write there.") from None

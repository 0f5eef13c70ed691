"""Uploads to the Hugging Face hub, for those who ask."""

from __future__ import annotations

import re
from pathlib import Path

from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError, first_few, first_line

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def refuse(repository: str) -> None:
    """Raise `UserError` for what is no name of a repository, before any work."""
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise UserError(f"--push {repository!r} is no repository of the hub", "such as --push my-lab/pap-clip")


def upload(folder: Path, repository: str, console: Console) -> str:
    """Make a private repository where there is none, and upload all of `folder`; its address.

    Raises
    ------
    UserError
        For whatever the hub or the way to it says, and for a repository with files that are not among these: an
        adapter that is there from before would be put on top of the model. The folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="cytoclip")
    try:
        made = api.create_repo(repository, private=True, exist_ok=True)
        ours = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        others = sorted(name for name in api.list_repo_files(repository) if name not in ours and name[0] != ".")
        if others:
            raise UserError(
                f"{folder} is exported, but {repository} holds files that are not of it: {first_few(others)}",
                "name another repository, or delete them there first: they may change what opens",
                ExitCode.SYSTEM,
            )
        console.say(f"uploading {folder} to {made}")
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Exported with cytoclip", ignore_patterns=[".*"]
        )
    except UserError:
        raise
    except Exception as error:  # of huggingface_hub, of whichever HTTP library it uses, and of the network
        raise UserError(
            f"{folder} is exported, but could not be uploaded to {repository}: {first_line(error)}",
            f"log in with `hf auth login` and a token that may write, then: {by_hand(folder, repository)}",
            ExitCode.SYSTEM,
        ) from error
    return str(made)


def by_hand(folder: Path, repository: str) -> str:
    """The command that uploads what is exported already, as privately as `upload` does."""
    return f"hf upload {repository} {folder} --private"

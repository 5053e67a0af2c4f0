"""The raters' secrets: who may open the page, and that a post comes from the page itself."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path

from rlaif_jax.config import UserError, require


def csrf_token(token: str) -> str:
    """What a page must send back with every post; made of the rater's token, of no use to read anything."""
    return hmac.new(token.encode(), b"rlaif-jax page", hashlib.sha256).hexdigest()


def token_file(store: Path) -> Path:
    """Where the raters' tokens are kept, readable by the owner alone: beside the store, never in it."""
    return store.with_name(store.name + ".tokens.json")


def rater_tokens(store: Path, raters: tuple[str, ...]) -> dict[str, str]:
    """Rater -> token; those of an earlier start go on being valid."""
    path = token_file(store)
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it to make new tokens") from error
    require(isinstance(known, dict), f"{path}: not an object of names and tokens; delete it to make new ones")
    tokens = {name: str(known.get(name) or secrets.token_urlsafe(24)) for name in raters}
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({**known, **tokens}, file, indent=1)
    temporary.replace(path)
    return tokens

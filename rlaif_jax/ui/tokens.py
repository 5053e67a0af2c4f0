"""The raters' secrets: who may open the page, and proof that a post comes from the page."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from pathlib import Path

from rlaif_jax.config import UserError, require
from rlaif_jax.files import atomic_write


def csrf_token(token: str) -> str:
    """Returns the token of a page's posts, which is derived from the rater's token and opens nothing."""
    return hmac.new(token.encode(), b"rlaif-jax page", hashlib.sha256).hexdigest()


def session_cookie(token: str, expires: int) -> str:
    """Returns the value of a rater's cookie, which holds until `expires` (Unix seconds).

    Browsers send cookies to every port of a machine: another server there must not learn the rater's token from it.
    """
    return f"{expires}.{hmac.new(token.encode(), f'session until {expires}'.encode(), hashlib.sha256).hexdigest()}"


def is_session(cookie: str, token: str, now: float) -> bool:
    """Returns whether a cookie is of the rater with this token and still holds."""
    expires = cookie.partition(".")[0]
    if not (expires.isascii() and expires.isdecimal() and len(expires) < 16):
        return False
    return hmac.compare_digest(cookie.encode(), session_cookie(token, int(expires)).encode()) and now < int(expires)


def token_file(store: Path) -> Path:
    """Returns the file of the raters' tokens: next to the store and readable only by its owner."""
    return store.with_name(store.name + ".tokens.json")


def rater_tokens(store: Path, raters: tuple[str, ...]) -> dict[str, str]:
    """Returns rater -> secret token of each rater; tokens of an earlier start stay valid.

    Args:
        store: the file of the records; the file of tokens is next to it and is written again.
        raters: the names of the raters.

    Raises:
        UserError: the file of tokens cannot be read or written.
    """
    path = token_file(store)
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it to make new tokens") from error
    require(isinstance(known, dict), f"{path}: not an object of names and tokens; delete it to make new ones")
    tokens = {name: str(known.get(name) or secrets.token_urlsafe(24)) for name in raters}
    with atomic_write(path, private=True) as file:
        json.dump({**known, **tokens}, file, indent=1)
    return tokens

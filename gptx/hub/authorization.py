"""The access token of the Hub: the caller's, or else that of the environment or the saved login."""

from __future__ import annotations

import os

from huggingface_hub import get_token

from gptx.errors import ParameterError, StorageError, argument

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
SAVED = "the token of `hf auth login`"


def find_token(given: str | None) -> str | None:
    """Return the token to send: the given one, or else `HF_TOKEN` or the saved login.

    Raises
    ------
    ParameterError
        An HTTP header cannot carry it. The message hides it.
    StorageError
        The file of the saved login cannot be read.
    """
    if given:
        check_token(given)
        return given
    try:
        token = get_token()
    except OSError as error:
        raise StorageError(f"{SAVED} cannot be read ({error}): set HF_TOKEN instead") from error
    except UnicodeError:
        raise ParameterError(f"{SAVED} is not text: run `hf auth login` again") from None
    variables = [name for name in VARIABLES if os.environ.get(name)]
    check_token(token, variables[0] if variables else SAVED)
    return token


def check_token(token: str | None, origin: str = argument("token")) -> None:
    """Check that an HTTP header can carry a token of this origin.

    Raises
    ------
    ParameterError
        It cannot. The message hides the token.
    """
    if token is not None and not isinstance(token, str):
        raise ParameterError(f"{origin} is a {type(token).__name__}, expected a string")
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise ParameterError(
            f"{origin} contains a space, a line end or a non-ASCII character: copy it again"
        )

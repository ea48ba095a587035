"""A picture from an http(s) URL, with limits on size and time."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request

from ..errors import PictureError

MAX_BYTES = 64 * 2**20
TIMEOUT = 20.0  # seconds without a byte
DEADLINE = 120.0  # seconds in all
CHUNK = 2**16


def fetch(url: str, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT) -> bytes:
    """The body of `url`. Redirects are followed, but to http and https alone."""
    request = None
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mlxvlm", "Accept": "image/*"})
        with _opener().open(request, timeout=timeout) as response:
            return _read(response, url, max_bytes)
    except urllib.error.HTTPError as error:
        error.close()
        raise PictureError(
            f"{url} cannot be fetched: the server says {error.code} {error.reason}."
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise PictureError(f"{url} cannot be fetched ({reason}): check the address.") from error


def _opener() -> urllib.request.OpenerDirector:
    # Not urlopen: its opener would follow a redirect to ftp as well.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _read(response: http.client.HTTPResponse, url: str, max_bytes: int) -> bytes:
    too_long = f"{url} is larger than the limit of {max_bytes / 2**20:g} MiB: download it first."
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise PictureError(too_long)
    end = time.monotonic() + DEADLINE
    body = bytearray()
    while chunk := response.read1(CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise PictureError(too_long)
        if time.monotonic() > end:
            raise PictureError(f"{url} took longer than {DEADLINE:g} s: download it first.")
    if length.isdigit() and len(body) < int(length):
        raise PictureError(f"{url} broke off after {len(body)} of {length} bytes: try again.")
    return bytes(body)

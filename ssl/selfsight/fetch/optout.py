"""Headers by which a site keeps an image out of data sets."""

from __future__ import annotations

from collections.abc import Iterable

# Directives of X-Robots-Tag that carry a value behind a colon, which is no user agent before it.
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


def opted_out(
    robots_tags: Iterable[str], tdm: str | None, directives: Iterable[str], agent: str
) -> str | None:
    """The header that keeps this image out, or None.

    Args:
        robots_tags: values of X-Robots-Tag, each `directive, directive` or `agent: directive, ...`;
            those for other agents are not for us.
        tdm: value of TDM-Reservation, or None to pass over it.
        directives: the directives that count, in lower case.
        agent: our name.
    """
    wanted = set(directives)
    for value in robots_tags:
        ours = True
        for part in value.split(","):
            head, colon, rest = part.strip().lower().partition(":")
            directive = head.strip()
            if colon and directive not in _VALUED:
                ours = directive == agent
                directive = rest.strip()
            if ours and directive in wanted:
                return f"X-Robots-Tag: {directive}"
    if tdm is not None and tdm.strip() == "1":
        return "TDM-Reservation: 1"
    return None

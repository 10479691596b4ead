"""The hash of a site's rules: what a dossier can name, and an ethics board can ask the site for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from grandrounds.site.custody.site_file import SiteFile

RULES = ("policy", "tell", "privacy", "secure")
"""Sections of site.toml that say what a run may do and what leaves."""


def policy_sha256(site: SiteFile) -> str:
    """Return the SHA-256 of the sections `RULES` of site.toml, in hexadecimal digits.

    Of the values, those that are not in the file included, as JSON with sorted keys: comments,
    order and the form of a number do not count. Everybody who can guess the values can check the
    guess, since nothing secret is in it.
    """
    rules = {name: asdict(getattr(site, name)) for name in RULES}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

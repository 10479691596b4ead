"""Serves a site whose examples come in the order of the run, for comparisons bit for bit.

    python -m tests.seeded_agent --config site.toml

An agent orders its examples by the site's secret; neither site.toml nor an option nor the
environment changes that.
"""

from __future__ import annotations

import sys

from grandrounds.__main__ import main
from grandrounds.site.custody import order

if __name__ == "__main__":
    order.choose = lambda *_: None  # type: ignore[assignment]
    sys.argv[1:1] = ["site", "serve"]
    main()

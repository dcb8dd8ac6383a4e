"""Analysis of expert use: recorder, count tables, heat maps, pictures."""

import runtime  # noqa: F401  # before matplotlib, so that Ctrl-C prints one line from here on

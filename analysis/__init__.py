"""Who the experts are: recorder, count tables, heat maps, pictures."""

import runtime  # noqa: F401  # before matplotlib: Ctrl-C is one line from here on

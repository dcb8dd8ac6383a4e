
import runtime  # noqa: F401  # before matplotlib: Ctrl-C is one line from here on

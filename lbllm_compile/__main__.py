"""``lbllm-compile`` and ``python -m lbllm_compile``: the command line."""

import sys


def main() -> None:
    """Entry point of the console script. An interrupt is no traceback even while the command line itself loads."""
    try:
        from lbllm_compile import cli

        cli.main()
    except KeyboardInterrupt:
        print("lbllm-compile: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

"""``python -m winnowkv``: the command ``winnow`` of this Python, also where it is not on the path."""

from winnowkv.cli.main import main

if __name__ == "__main__":
    main()

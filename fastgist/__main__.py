"""``python -m fastgist``: the same as the ``fastgist`` command."""

from fastgist.cli import main

if __name__ == "__main__":
    main()

"""Entry point of `python -m llmdistill` and of `accelerate launch -m llmdistill`."""

from llmdistill.cli import main

if __name__ == "__main__":
    main()

"""`python -m llmdistill`, and what `accelerate launch -m llmdistill` starts."""

from llmdistill.cli import main

if __name__ == "__main__":
    main()

"""`python -m kvfold` is `kvfold`."""

from kvfold.cli.main import main

main()

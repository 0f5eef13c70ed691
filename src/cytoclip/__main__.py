"""`python -m cytoclip`, and `accelerate launch -m cytoclip`."""

from cytoclip.cli import main

main()

"""`python -m knockwood`."""

from knockwood.cli.main import run

if __name__ == "__main__":
    run()

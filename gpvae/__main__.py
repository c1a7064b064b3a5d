"""`python -m gpvae` is the `gpvae` command."""

from gpvae.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

"""``python -m kdcache``."""

from kdcache.cli import main

if __name__ == "__main__":
    main()

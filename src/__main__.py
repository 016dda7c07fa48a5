"""``python -m isoshard run …``"""

from .launcher import main

if __name__ == "__main__":
    main()

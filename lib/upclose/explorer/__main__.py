"""`python -m upclose.explorer FOLDER`: the explorer of the book, from birdlets-tiny and Birdlets."""

import sys

from upclose import encode, explorer

if __name__ == "__main__":
    found = explorer.gallery(encode.load("birdlets-tiny"))
    print(explorer.write(sys.argv[1], [each for _, each in found], explorer.tour(found)))

"""Pictures a second of the generator, by domain, on two processes of one thread each."""

import multiprocessing

from measure import rates

from upclose import birdlets

PICTURES, ROUNDS, PROCESSES = 400, 3, 2
TARGET = 300


def draw(part):
    """Draw every PROCESSES-th picture of a domain, from `start`."""
    domain, start = part
    data = birdlets.dataset("test", domain, n=PICTURES)
    for i in range(start, PICTURES, PROCESSES):
        data.load(i)


def main():
    pixels = birdlets.DEFAULT.pixels
    print(f"{PICTURES} pictures of {pixels} x {pixels}, {PROCESSES} processes, pictures/s, best of {ROUNDS}")
    print("measure | ours | target")
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        for domain in birdlets.DOMAINS:
            parts = [(domain, k) for k in range(PROCESSES)]
            (ours,) = rates(PICTURES, lambda: pool.map(draw, parts, chunksize=1), rounds=ROUNDS)  # noqa: B023
            print(f"{domain} | {ours:.0f} | {TARGET}")


if __name__ == "__main__":
    main()

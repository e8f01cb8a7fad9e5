"""`python -m benchmarks.compare`."""

from benchmarks.compare.run import main

if __name__ == "__main__":
    main()

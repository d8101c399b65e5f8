"""What torchrun starts: python -m course_utils.distributed ring.py --out results."""

from course_utils.distributed.worker import main

if __name__ == "__main__":
    main()

"""`python -m course_utils.course.book`: what `make book` calls."""

import sys

from course_utils.course.book.make import make
from course_utils.course.chapters import UsageError

if __name__ == "__main__":
    try:
        print(make())
    except UsageError as error:
        print(f"book: {error}", file=sys.stderr)
        sys.exit(2)

"""Make persuasion.txt from Debian's package r-cran-janeaustenr: give this file the path of its data
folder.

python datasets/make_persuasion.py /usr/lib/R/site-library/janeaustenr/data
"""

import gzip
import sys
import zlib
from pathlib import Path

import rdata

HERE = Path(__file__).resolve().parent


def lines(folder: Path, name: str = "persuasion") -> list[str]:
    """R's lazy-load database: an index of (offset, length) by name, then a length and a zlib stream
    a variable.
    """
    index = rdata.conversion.convert(
        rdata.parser.parse_data(gzip.decompress((folder / "Rdata.rdx").read_bytes()))
    )
    offset, length = (int(v) for v in index["variables"][name])
    block = (folder / "Rdata.rdb").read_bytes()[offset : offset + length]
    return list(rdata.conversion.convert(rdata.parser.parse_data(zlib.decompress(block[4:]))))


def main() -> None:
    text = "\n".join(lines(Path(sys.argv[1]))).strip() + "\n"
    (HERE / "persuasion.txt").write_text(text, encoding="utf-8")
    print(len(text.split()), "words")


if __name__ == "__main__":
    main()

"""Write SHA256.json over the data files: the last step after any of the other make_ scripts."""

import json
from pathlib import Path

from course_utils import data

HERE = Path(__file__).resolve().parent


def main() -> None:
    files = sorted(
        p
        for p in HERE.iterdir()
        if p.suffix in {".npz", ".txt", ".safetensors"} or p.name == "real_pair.json"
    )
    (HERE / "SHA256.json").write_text(
        json.dumps({p.name: data.sha256(p) for p in files}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()

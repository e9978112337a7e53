"""The part of the paper's data that the results of this project are of, made from the whole.

    python -m driftlens.experiments.paper_data merged_counterfact.json

``merged_counterfact.json`` is in the folder ``data`` of the paper's repository
(https://github.com/PinzhengWang322/Reveal_Attention_Drift). Which of its records belong to the part
is told by their hashes, in ``assets/paper-records.txt``; whether the file that they give is the one
that was used, by its SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from driftlens.assets import asset
from driftlens.errors import DataError, DriftLensError
from driftlens.records import write_result

NAME = "counterfact_wikidata_dev.json"
SHA256 = "945d5f8304da74364dfdf016fa6c34acc87aa37103bf1ef8a19b48b2080ab3d6"
"""Of the file."""


def record_hash(record: Any) -> str:
    """Of what a record holds, however it is written: 12 hexadecimal digits."""
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def part_of(records: Sequence[Any]) -> str:
    """The text of the file with the part's records, in whatever order these are.

    Raises:
        DataError: If some of them are not among these records, or what they give is another file.
    """
    wanted = asset("paper-records.txt").read_text("ascii").split()
    by_hash = {record_hash(record): record for record in records}
    missing = len(set(wanted) - by_hash.keys())
    if missing:
        raise DataError(
            f"{missing} of the {len(wanted)} records of {NAME} are not in this file.",
            "Give data/merged_counterfact.json of the paper's repository.",
        )
    text = json.dumps([by_hash[one] for one in wanted], indent=1, ensure_ascii=False)
    if hashlib.sha256(text.encode()).hexdigest() != SHA256:
        raise DataError(
            f"The records give another file than {NAME}: their fields are in another order.",
            "Give data/merged_counterfact.json of the paper's repository as it is.",
        )
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("whole", type=Path, help="merged_counterfact.json of the paper.")
    parser.add_argument("--out", type=Path, default=Path(NAME))
    options = parser.parse_args()
    try:
        write_result(options.out, part_of(_records(options.whole)))
    except DriftLensError as error:
        sys.exit(f"Error: {error}")
    sys.stdout.write(f"wrote {options.out}\n")


def _records(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}.", "Give its path."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON.", "Download it again.") from error
    if not isinstance(records, list):
        raise DataError(f"{path} is no list of records.", "Give the merged file.")
    return records


if __name__ == "__main__":
    main()

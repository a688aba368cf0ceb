"""Files that the user has downloaded: known by size and sha256, explained where they are missing.

    python -m extras.files FILE ...         size and sha256 of each
"""
import hashlib
import sys
from pathlib import Path

import data


def digest(path: str | Path) -> str:
    """sha256 of a file."""
    with open(Path(path).expanduser(), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_file(path: str | Path, what: str, url: str, size: int, sha256: str) -> Path:
    """The path of a file the user has downloaded, checked by size and sha256 (or its first digits)."""
    path = Path(path).expanduser()
    fix = f"download {url} ({size:,} bytes, sha256 {sha256}) to {path}"
    if not path.exists():
        raise FileNotFoundError(f"{path}: {what} not found; {fix}")
    length, own = path.stat().st_size, digest(path)
    if length != size or not own.startswith(sha256):
        raise ValueError(f"{path}: {length:,} bytes, sha256 {own[:16]}: incomplete, or not {what}; {fix}")
    return path


def main() -> None:
    for path in sys.argv[1:]:
        print(f"{path}: {Path(path).stat().st_size:,} bytes, sha256 {digest(path)}")


if __name__ == "__main__":
    data.run_cli(main)

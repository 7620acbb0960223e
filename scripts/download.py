"""Fetch MVTec AD and unpack it into --data-root; nothing is done where all of it is there.

A download that broke off goes on where it stopped. --url takes a mirror or a local file, with the
authors' bytes.
"""

import hashlib
import shutil
import sys
import tarfile
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly.cli import Parser

# isort: split
from tqdm import tqdm

from ganomaly.data import MVTEC, data_root_of
from ganomaly.errors import UserError, guard
from ganomaly.files import locked

URL = (
    "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/"
    "download/420938113-1629960298/mvtec_anomaly_detection.tar.xz"
)
SIZE = 5_264_982_680  # bytes of the archive; its files take about as much again
SHA256 = "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"
LICENCE = "MVTec AD (Bergmann et al., CVPR 2019), licence CC BY-NC-SA 4.0: not for commercial use"
HINT = "URL= takes a mirror or a local file"


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="[data/mvtec]")
    parser.add_argument("--url", default=URL, metavar="URL", help="a mirror or a local file")
    args = parser.parse_args(argv)
    root = data_root_of("mvtec", args.data_root)
    missing = [name for name in MVTEC if not (root / name / "train" / "good").is_dir()]
    if not missing:
        print(f"{root}: all {len(MVTEC)} categories are there, nothing to do")
        return 0
    if broken := ", ".join(str(root / name) for name in missing if (root / name).exists()):
        raise UserError(f"{broken}: there, but without train/good; move it out of the way")
    if not hasattr(tarfile, "data_filter"):
        raise UserError("Python 3.10.12, 3.11.4 or later is needed, which unpacks safely")
    print(f"{LICENCE}; 4.9 GB to download, 5 GB unpacked", file=sys.stderr)
    with locked(root):
        local = not args.url.startswith(("http://", "https://"))
        archive = root / ".mvtec_anomaly_detection.tar.xz"
        if local and not (archive := Path(args.url.removeprefix("file://"))).is_file():
            raise UserError(f"--url {args.url}: no such file; {HINT}")
        if (free := shutil.disk_usage(root).free) < (needed := 2.1 * SIZE - size_of(archive)):
            raise UserError(
                f"{root}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; "
                "make room, or name another folder with DATA_ROOT="
            )
        if not local:
            download(args.url, archive)
        verify(archive, keep=local)
        unpack(archive, root, missing)
        if not local:
            archive.unlink()  # only now: after a killed unpacking it is not fetched again
    print(f"{root}: {len(missing)} categories added")
    return 0


def download(url: str, archive: Path) -> None:
    """Append what the archive lacks, in as many connections as bring more of it."""
    while (size := size_of(archive)) < SIZE:
        reason = "the connection broke off"
        try:
            request = Request(url, headers={"Range": f"bytes={size}-"})
            with urlopen(request, timeout=60) as answer:
                start = size if answer.status == 206 else 0  # else the server sends all of it
                if int(answer.headers.get("Content-Length", 0)) != SIZE - start:
                    raise UserError(f"{url}: not MVTec AD's archive of {SIZE:,} bytes; {HINT}")
                with open(archive, "ab" if start else "wb") as file:
                    with progress(answer, "download", start) as reader:
                        shutil.copyfileobj(reader, file, 1 << 20)
        except (OSError, ValueError, HTTPException) as error:
            reason = error
        if size_of(archive) <= size:
            raise UserError(f"{url}: {reason}; the same command goes on from there; {HINT}")


def verify(archive: Path, keep: bool) -> None:
    digest = hashlib.sha256()
    with open(archive, "rb") as file, progress(file, "checksum") as reader:
        while block := reader.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        if not keep:
            archive.unlink()
        raise UserError(f"{archive}: its sha256 is not {SHA256}, that of MVTec AD; {HINT}")


def unpack(archive: Path, root: Path, missing: list[str]) -> None:
    """Move the missing categories of the archive into root, each whole or not at all."""
    hidden = root / ".unpacking"
    shutil.rmtree(hidden, ignore_errors=True)  # of a killed process
    try:
        with open(archive, "rb") as file, progress(file, "unpack") as reader:
            with tarfile.open(fileobj=reader, mode="r:xz") as tar:
                tar.extractall(hidden, filter="data")  # refuses what leads out of the folder
        if lacking := [name for name in missing if not (hidden / name / "train/good").is_dir()]:
            raise UserError(f"{archive}: has no {', '.join(lacking)}; {HINT}")
        for name in missing:
            (hidden / name).rename(root / name)
    except tarfile.TarError as error:
        raise UserError(f"{archive}: cannot be unpacked: {error}; {HINT}") from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def progress(file, title: str, start: int = 0):
    return tqdm.wrapattr(file, "read", SIZE, desc=title, initial=start, disable=None)


if __name__ == "__main__":
    sys.exit(guard(main))

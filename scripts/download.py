"""Download MVTec AD and unpack it into --data-root.

A download that broke off goes on where it stopped. Nothing is done if all categories are there.
"""

import hashlib
import shutil
import sys
import tarfile
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from ganomaly.cli import Parser
from ganomaly.data import MVTEC, data_root_of
from ganomaly.errors import UserError, guard
from ganomaly.files import locked

URL = (
    "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/"
    "download/420938113-1629960298/mvtec_anomaly_detection.tar.xz"
)
SIZE = 5_264_982_680  # bytes of the archive; its files take about as much again
SHA256 = "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"
LICENCE = "MVTec AD (Bergmann et al., CVPR 2019): CC BY-NC-SA 4.0, not for commercial use; 5.3 GB"
HINT = "URL= takes a mirror or a local file"


def main(argv=None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="[data/mvtec]")
    parser.add_argument("--url", default=URL, metavar="URL", help="a mirror or a local file")
    args = parser.parse_args(argv)
    root = data_root_of("mvtec", args.data_root)
    missing = [root / name for name in MVTEC if not (root / name / "train" / "good").is_dir()]
    if not missing:
        print(f"{root}: all {len(MVTEC)} categories are there, nothing to do")
        return
    if broken := ", ".join(str(folder) for folder in missing if folder.exists()):
        raise UserError(f"{broken}: there, but without train/good; move it out of the way")
    local = not args.url.startswith(("http://", "https://"))
    archive = Path(args.url) if local else root / ".mvtec_anomaly_detection.tar.xz"
    if local and not archive.is_file():
        raise UserError(f"--url {args.url}: no such file; {HINT}")
    print(LICENCE, file=sys.stderr)
    with locked(root):
        size = archive.stat().st_size if archive.exists() else 0
        needed, free = (2.1 * SIZE - size) / 1e9, shutil.disk_usage(root).free / 1e9
        if free < needed:
            message = f"{root}: {needed:.1f} GB are needed, {free:.1f} GB are free; make room"
            raise UserError(f"{message}, or name another folder with DATA_ROOT=")
        if not local and size < SIZE:
            download(args.url, archive, size)
        print(f"{archive}: it is checked and unpacked, which takes minutes", file=sys.stderr)
        size = archive.stat().st_size
        if size != SIZE or hashlib.sha256(np.memmap(archive, mode="r")).hexdigest() != SHA256:
            advice = "name another file" if local else "remove it"
            raise UserError(f"{archive}: its sha256 is not {SHA256}, that of MVTec AD; {advice}")
        unpack(archive, missing)
        if not local:
            archive.unlink()
    print(f"{root}: {len(missing)} categories added")


def download(url: str, archive: Path, size: int) -> None:
    """Append what follows the first `size` bytes. After a break the next call goes on."""
    try:
        with urlopen(Request(url, headers={"Range": f"bytes={size}-"}), timeout=60) as answer:
            start = SIZE - int(answer.headers.get("Content-Length", 0))
            if start not in (0, size):  # 0: the server knows no ranges and sends all of it
                raise UserError(f"{url}: not MVTec AD's archive of {SIZE:,} bytes; {HINT}")
            bar = tqdm.wrapattr(answer, "read", SIZE, initial=start, disable=None)
            with bar as reader, open(archive, "ab" if start else "wb") as file:
                shutil.copyfileobj(reader, file, 1 << 20)
                if file.tell() < SIZE:
                    raise OSError("the connection broke off")
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(f"{url}: {error}; the same command goes on from there; {HINT}") from None


def unpack(archive: Path, folders: list[Path]) -> None:
    """Take the folders of these names out of the archive, each whole or not at all."""
    hidden = folders[0].parent / ".unpacking"
    shutil.rmtree(hidden, ignore_errors=True)  # a killed process left it
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(hidden, filter="data")  # refuses what leads out of the folder
        for folder in folders:
            (hidden / folder.name).rename(folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(guard(main))

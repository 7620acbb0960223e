"""Fetch MVTec AD, verify it and unpack it into --data-root; nothing is done where it is complete.

A download that broke off goes on where it stopped. --url takes a mirror or a local file; whatever
the source, the bytes have to be the authors'.
"""

import hashlib
import http.client
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly.cli import Parser
from ganomaly.errors import UserError, guard

URL = (
    "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/"
    "download/420938113-1629960298/mvtec_anomaly_detection.tar.xz"
)
SHA256 = "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"
GB = 1e9
PAUSE = 2  # seconds before a broken connection is tried again
UNPACKED = 1.1  # of the archive's size: PNG files hardly pack


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="[data/mvtec]")
    parser.add_argument("--url", default=URL, metavar="URL", help="a mirror or a local file")
    args = parser.parse_args(argv)
    from ganomaly.data import MVTEC, data_root_of
    from ganomaly.files import locked

    root = data_root_of("mvtec", args.data_root)
    missing = [name for name in MVTEC if not (root / name / "train" / "good").is_dir()]
    if not missing:
        print(f"{root}: all {len(MVTEC)} categories are there, nothing to do")
        return 0
    if others := [str(root / name) for name in missing if (root / name).exists()]:
        raise UserError(
            f"{', '.join(others)}: there, but without train/good; move it out of the way"
        )
    print(
        "MVTec AD (Bergmann et al., CVPR 2019): 4.9 GB to download, 5 GB unpacked; licence "
        "CC BY-NC-SA 4.0, not for commercial use",
        file=sys.stderr,
    )
    if not hasattr(tarfile, "data_filter"):
        raise UserError("Python 3.10.12, 3.11.4 or later is needed, which unpacks safely")
    with locked(root, tidy=True):
        return add(root, missing, args.url)


def add(root: Path, missing: list[str], url: str) -> int:
    local = Path(url.removeprefix("file://"))
    if "://" not in url or url.startswith("file://"):
        if not local.is_file():
            raise UserError(f"--url {url}: no such file")
        verify(local, keep=True)
        unpack(local, root, missing)
    else:
        archive = root / ".mvtec_anomaly_detection.tar.xz"
        if not archive.is_file():
            part = archive.with_name(archive.name + ".part")
            fetch(url, part)
            verify(part, keep=False)
            part.rename(archive)  # verified: a killed unpacking needs no second download
        unpack(archive, root, missing)
        archive.unlink()
    print(f"{root}: {len(missing)} categories added")
    return 0


def fetch(url: str, part: Path) -> None:
    """Download url into the file `part`, going on behind what it holds, as often as it helps."""
    while True:
        have = part.stat().st_size if part.is_file() else 0
        try:
            total = fetch_rest(url, part, have)
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # nothing behind what we have: the checksum will tell
                return
            raise UserError(f"{url}: {error.code} {error.reason}; URL= takes a mirror") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.filename == str(part):
                raise  # the disk's fault
            total, reason = None, getattr(error, "reason", None) or error
        else:
            reason = "the connection broke off"
        got = part.stat().st_size if part.is_file() else 0
        if total is not None and got >= total:
            return
        if got <= have:
            raise UserError(
                f"{url}: {reason} at {got / GB:.2f} GB; the same command goes on from there, "
                "URL= takes a mirror or a local file"
            )
        time.sleep(PAUSE)


def fetch_rest(url: str, part: Path, have: int) -> int:
    """One connection; returns the size that the whole file should have."""
    from tqdm import tqdm

    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        if answer.status != 206:  # the server sends all of it
            have = 0
        rest = getattr(answer, "length", None)
        if rest is None:
            raise ValueError("the server does not say how long the file is")
        check_disk(part.parent, rest + UNPACKED * (have + rest))
        bar = tqdm(
            total=have + rest, initial=have, desc="download", unit="B", unit_scale=True,
            disable=None,
        )  # fmt: skip
        with bar, open(part, "r+b" if have else "wb") as file:
            file.seek(have)
            while block := answer.read(1 << 20):
                try:
                    file.write(block)
                except OSError as error:
                    error.filename = str(part)
                    raise
                bar.update(len(block))
    return have + rest


def check_disk(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {needed / GB:.1f} GB are needed, {free / GB:.1f} GB are free; "
            "make room, or name another folder with DATA_ROOT="
        )


def verify(archive: Path, keep: bool) -> None:
    """UserError where the bytes are not the authors'; ours are then removed."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    size = archive.stat().st_size
    with open(archive, "rb") as file, tqdm(
        total=size, desc="checksum", unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:  # fmt: skip
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != SHA256:
        if not keep:
            archive.unlink()
        raise UserError(
            f"{archive}: sha256 {digest.hexdigest()}, but MVTec AD's archive has {SHA256}; "
            + ("name another file" if keep else "removed, try again or take another URL=")
        )


def unpack(archive: Path, root: Path, missing: list[str]) -> None:
    """Move the missing categories of the archive into root, each whole or not at all."""
    from tqdm import tqdm

    check_disk(root, UNPACKED * archive.stat().st_size)
    aside = root / ".unpacking"
    shutil.rmtree(aside, ignore_errors=True)  # of a killed process
    try:
        with tarfile.open(archive) as tar, tqdm(desc="unpack", unit="file", disable=None) as bar:
            for member in tar:
                tar.extract(member, aside, filter="data")  # refuses what leads out of the folder
                bar.update()
        found = {name: p for name in missing for p in aside.glob(f"**/{name}/train/good")}
        if lacking := [name for name in missing if name not in found]:
            raise UserError(f"{archive}: has no {', '.join(lacking)}; is it MVTec AD?")
        for name, good in found.items():
            good.parent.parent.rename(root / name)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive}: cannot be unpacked: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(guard(main))

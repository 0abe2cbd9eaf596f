"""The image: as hadolint wants it, nobody's root, built without BuildKit, and with the pinned libraries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from danlu import __version__ as version

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "ops" / "docker" / "Dockerfile"


def stages() -> dict[str, str]:
    """Stage -> its lines."""
    parts = re.split(r"^FROM (\S+) AS (\S+)$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[2::3], parts[3::3], strict=True))


def test_hadolint_has_nothing_against_it() -> None:
    done = subprocess.run([Path(sys.executable).parent / "hadolint", str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_images_run_as_nobody_of_note_and_say_whether_they_are_well() -> None:
    for name in ("cpu", "gpu"):
        stage = stages()[name]
        assert "\nUSER 1000:1000\n" in stage, "runAsNonRoot needs a number"
        assert "\nHEALTHCHECK " in stage
        assert "pip install" not in stage, "what builds stays in the builder"


def make(*arguments: str) -> list[str]:
    """The commands that a target would run, also where `make test` runs this."""
    command = ["make", "-n", "--no-print-directory", "-f", "ops/docker/Makefile", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\\\n", "").splitlines()


def test_an_image_says_what_it_is_and_of_which_commit() -> None:
    for name in ("cpu", "gpu"):
        (build,) = make("image", f"TARGET={name}", "IMAGE=registry/danlu", "REVISION=abc", "BASE=python@sha256:0")
        given = dict(re.findall(r"--build-arg (\w+)=(\S+)", build))
        assert given == {"PYTHON_IMAGE": "python@sha256:0", "VERSION": version, "REVISION": "abc"}
        assert f"--target {name} " in build
        assert f"-t registry/danlu:{version}-{name} ." in build
        stage = stages()[name]
        labels = dict(re.findall(r'org\.opencontainers\.image\.([a-z.]+)="([^"]*)"', stage))
        assert {"title", "description", "licenses"} < set(labels)
        named = {labels[label].removeprefix("$") for label in ("version", "revision", "base.name")}
        assert named == set(given)
        assert named == set(re.findall(r"^ARG (\w+)", stage, re.MULTILINE)), "an ARG of before FROM has no value in a stage"


def test_what_is_in_an_image_is_told_by_its_own_python_and_dpkg() -> None:
    _, packages, debian = make("sbom", "TARGET=gpu", "IMAGE=d", "OUT=out")
    assert re.search(
        r"--entrypoint sh d:\S+-gpu -c '.* cyclonedx-py environment --output-format JSON /opt/danlu/bin/python' > out/gpu\.cdx\.json",
        packages.replace("/tmp/sbom/bin/", ""),
    )
    assert re.search(r"--entrypoint dpkg-query d:\S+-gpu --show > out/gpu\.debian\.txt", debian)


def test_an_older_builder_can_build_it() -> None:
    text = DOCKERFILE.read_text()
    assert not re.search(r"^RUN --|<<|^# syntax=|^COPY --(link|chmod|parents)", text, re.MULTILINE)


def test_what_is_installed_is_pinned() -> None:
    installs = re.findall(r"pip install .*", DOCKERFILE.read_text())
    assert installs
    assert all("-c constraints.txt" in line or "--no-deps" in line for line in installs)


def test_an_edit_of_the_code_leaves_the_layer_of_its_libraries_as_it_is() -> None:
    for name in ("cpu", "gpu"):
        found = stages()
        assert "COPY platform" not in found["base"] + found["builder"] + found[f"libraries-{name}"]
        copied = re.findall(r"^COPY --from=(\S+)", found[name], re.MULTILINE)
        assert copied == [f"libraries-{name}", f"build-{name}"]


def test_what_is_copied_is_sent_to_the_builder() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE.read_text(), re.MULTILINE) for name in line.split()[:-1]}
    assert copied <= sent

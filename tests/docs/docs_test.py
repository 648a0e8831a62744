"""The documents against the programs: manual pages are well formed and name every command and
flag of attnctl, docs/operations.md has every status with its gRPC code, and links lead somewhere.

    docs_test.py SOURCE ATTNCTL
"""

import pathlib
import re
import shutil
import subprocess
import sys
import unittest

SOURCE = pathlib.Path(sys.argv[1])
ATTNCTL = sys.argv[2]

GRPC_NAMES = (
    "OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS "
    "PERMISSION_DENIED RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED "
    "INTERNAL UNAVAILABLE DATA_LOSS UNAUTHENTICATED"
).split()


def help_of(*arguments):
    done = subprocess.run([ATTNCTL, *arguments], capture_output=True, text=True, timeout=30)
    return done.stdout + done.stderr


def flags_of(text):
    """Whole flags; `--tls-...` stands for several and is none."""
    return set(re.findall(r"--([a-z][a-z0-9-]*[a-z0-9])", re.sub(r"--[a-z-]+-\.\.\.", "", text)))


class ManualPages(unittest.TestCase):
    def test_are_well_formed(self):
        if shutil.which("mandoc") is None:
            self.skipTest("no mandoc here (Debian: mandoc)")
        pages = sorted((SOURCE / "docs/man").glob("*.[1-8]"))
        self.assertGreaterEqual(len(pages), 3)
        for page in pages:
            done = subprocess.run(
                ["mandoc", "-T", "lint", "-W", "warning", page], capture_output=True, text=True)
            self.assertEqual(done.stdout, "", "what mandoc says of it")

    def test_attnctl_has_every_command_and_flag(self):
        page = (SOURCE / "docs/man/attnctl.1").read_text()
        main = help_of("--help")
        commands = re.findall(r"^  ([a-z]+)\b", main, re.M)
        self.assertIn("status", commands)
        offered = flags_of(main)
        for command in commands:
            self.assertRegex(page, rf"(?m)^\.It Cm {command}\b", "docs/man/attnctl.1 lacks a command")
            offered |= flags_of(help_of(command, "--help"))
        # Those of other programs, in running text, are no flags of ours.
        documented = set(re.findall(r"Fl -([a-z0-9-]+)", page))
        self.assertEqual(offered - {"workers"}, documented, "attnctl --help, and docs/man/attnctl.1")


class Operations(unittest.TestCase):
    def test_every_status_has_a_row(self):
        header = (SOURCE / "base/attn_types.h").read_text()
        statuses = re.findall(r"^    (ATTN_(?:OK|ERR_\w+))\s*=", header, re.M)
        codes = dict(re.findall(r"\{(ATTN_(?:OK|ERR_\w+)), (\d+),", (SOURCE / "base/status.c").read_text()))
        self.assertGreaterEqual(len(statuses), 19)
        self.assertEqual(sorted(statuses), sorted(codes))
        page = (SOURCE / "docs/operations.md").read_text()
        for status in statuses:
            if status == "ATTN_OK":
                continue
            code = int(codes[status])
            row = rf"(?m)^\| `{status}` \| {GRPC_NAMES[code]} \({code}\) \| [^|]+ \| [^|]+ \| [^|]+ \|$"
            self.assertRegex(page, row, f"docs/operations.md: no row of {status} with its gRPC code")
        rows = re.findall(r"^\| `(ATTN_ERR_\w+)`", page, re.M)
        self.assertEqual(sorted(rows), sorted(set(statuses) - {"ATTN_OK"}), "rows of no status")


class Links(unittest.TestCase):
    def test_lead_to_files_and_headings(self):
        listed = subprocess.run(["git", "-C", SOURCE, "ls-files", "*.md"], capture_output=True, text=True)
        pages = [SOURCE / name for name in listed.stdout.split()] or sorted(SOURCE.glob("*.md"))
        self.assertTrue(pages)
        for page in pages:
            for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
                if "://" in target:
                    continue
                name, _, anchor = target.partition("#")
                file = (page.parent / name) if name else page
                self.assertTrue(file.exists(), f"{page.name} links to {target}")
                if anchor and file.suffix == ".md":
                    self.assertIn(anchor, self.anchors(file), f"{page.name} links to {target}")

    @staticmethod
    def anchors(page):
        heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
        return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
